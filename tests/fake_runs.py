"""Runs that cost nothing, for the tests of the sweep's engine. Light to import: the processes that are killed start in a moment."""

import hashlib
import json
from dataclasses import asdict

from edgelab.shape import tiny
from edgelab.sweep_space import METRICS, Configuration, space


def fake_id(c: Configuration) -> str:
    return hashlib.sha256(c.to_json().encode()).hexdigest()[:12]


def fake_row(c: Configuration) -> dict:
    """A row of the whole schema that costs nothing and depends on the configuration alone."""
    seed = int(hashlib.sha256(c.to_json().encode()).hexdigest()[:8], 16) / 16**8
    row = {k: getattr(c, k) for k in ("label", "model", "method", "scheme", "bits", "group", "sparsity", "pattern", "experts", "top_k")}
    row |= {"channels": c.channels, "kept_by": c.kept_by, "ends": c.ends, "recipe": c.recipe.to_json(), "size_bytes": int(1e6 * c.bits)}
    for m in METRICS:
        row |= {m: seed, f"{m}_low": seed / 2, f"{m}_high": (1 + seed) / 2}
    row |= {"bits_per_weight": c.bits, "doc_kld": [seed], "doc_nll": [1.0], "doc_exact": [True], "layer_name": ["w"], "layer_bytes": [8]}
    row |= {"layer_error": [None], "read_bytes": 1.0, "macs": 1.0, "kv_bytes": 1.0, "layers": 2, "hidden": 8}
    return row | {"shape": json.dumps(asdict(tiny())), "seconds": 0.01, "provenance": "measured at build"}


def fake_jobs(n: int) -> dict[str, Configuration]:
    return {fake_id(c): c for c in space()[:n]}
