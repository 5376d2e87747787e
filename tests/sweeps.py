"""A made-up sweep of the stored form, for tests of what reads one: seeded, of any size, and with the traps that a real one has.

Values are drawn, not measured, and say so; what a test asserts is how they are handled. Per-document numbers and the row's means
agree with each other, as they must for a paired comparison.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.shape import from_config

METHODS = ("rtn", "mse", "hqq", "gptq", "awq")
SLOPPY = {"fp": 0.0, "rtn": 1.0, "mse": 0.8, "hqq": 0.75, "gptq": 0.5, "awq": 0.6}
PROSE, CODE, ASSISTANT, ARITHMETIC = 10, 9, 60, 40  # documents


def documents(rng: np.random.Generator) -> list[dict]:
    """What the metadata says of each test document. Pieces of a long one share their source."""
    found = []
    for domain, n in (("prose", PROSE), ("code", CODE)):
        for i in range(n):
            tokens = int(rng.integers(120, 500))
            found.append({"domain": domain, "source": f"{domain}-{i // 2}", "tokens": tokens, "bytes": int(tokens * 3.4)})
    for domain, n in (("assistant", ASSISTANT), ("arithmetic", ARITHMETIC)):
        found += [{"domain": domain, "source": f"{domain}-{i}", "tokens": 12, "bytes": 40} for i in range(n)]
    return found


def made_up(n: int = 240, seed: int = 0) -> pa.Table:
    """A table of `n` rows in the contract's columns, metadata and all."""
    rng = np.random.default_rng(seed)
    docs = documents(rng)
    text = [d for d in docs if d["domain"] in ("prose", "code")]
    tokens, nbytes = (np.array([d[k] for d in text], float) for k in ("tokens", "bytes"))
    hard = rng.uniform(0.5, 1.6, len(text))  # of each document, the same for all rows: that is what pairing takes out
    tricky = rng.uniform(0, 1, ASSISTANT + ARITHMETIC)
    config, dense = (json.loads((data_dir() / name / "config.json").read_text(encoding="utf-8")) for name in ("edge-moe", "edge-dense"))
    rows = []
    for i in range(n):
        model = ("edge-moe", "edge-dense", "edge-phone")[int(rng.choice(3, p=(0.7, 0.2, 0.1)))]
        moe = model != "edge-dense"
        method = "fp" if i < 3 else METHODS[int(rng.integers(len(METHODS)))]
        if i < 3:
            model, moe = ("edge-moe", "edge-dense", "edge-phone")[i], i != 1
        bits = 16.0 if method == "fp" else float(rng.choice((2, 3, 4, 8)))
        group = -1 if method == "fp" else int(rng.choice((0, 32, 64, 128)))
        scheme = "fp" if method == "fp" else f"int{bits:g}-" + (f"g{group}" if group else "row")
        sparsity, pattern = ((0.0, ""), (0.25, "unstructured"), (0.5, "2:4"), (0.5, "unstructured"))[
            int(rng.choice(4, p=(0.7, 0.1, 0.1, 0.1)))
        ]
        full = config["n_routed_experts"]
        experts = int(rng.choice((full, full * 3 // 4, full // 2))) if moe else 0
        top_k = int(rng.choice((config["num_experts_per_tok"], 1))) if moe else 0
        channels = float(rng.choice((0.0, 0.0, 0.0, 0.25)))
        if method == "fp":
            sparsity, pattern, experts, top_k, channels = 0.0, "", full if moe else 0, config["num_experts_per_tok"] if moe else 0, 0.0
        # how much is lost: rounding, zeros, experts and channels that are gone; a little luck
        lost = SLOPPY[method] * (0.9 * 4.0 ** (3 - bits) * (1 + 0.4 * (group in (0, 128)))) + 0.6 * sparsity**2
        lost += (0.25 * (1 - experts / full) + 0.05 * (top_k == 1)) * moe + 0.5 * channels**2
        lost = 0.0 if method == "fp" else lost * float(rng.lognormal(0, 0.12)) + (0.12 if model == "edge-phone" else 0.0)
        kld = (lost * hard * tokens * rng.lognormal(0, 0.1, len(text))).astype(np.float32)
        nll = (tokens * (2.2 * hard + (0.15 if not moe else 0.0)) + 0.9 * kld).astype(np.float32)
        exact = tricky < 1 / (1 + np.exp(-(3.2 - 5 * lost - (0.4 if not moe else 0)))) - 0.02 * rng.uniform(0, 1, len(tricky))
        width = bits if group in (0, -1) else bits + 16 / group
        share = (0.45 + 0.55 * experts / full) if moe else 0.8
        size = int(7.4e6 * width / 8 * share * (1 - 0.3 * channels) * (1 - sparsity * (0.4 if pattern else 0)))
        cut = config | {"n_routed_experts": experts, "num_experts_per_tok": top_k} if moe else dense
        shape = from_config(cut, width, name=model)
        layers = [
            f"model.layers.{k}.{w}.weight"
            for k in range(config["num_hidden_layers"])
            for w in ("self_attn.o_proj", "mlp.experts.down_proj")
        ]
        error = rng.uniform(0.5, 1.5, len(layers)) * (0.0 if method == "fp" else 0.6 * 2.0 ** (1 - bits))
        if channels:
            error[1::2] = np.nan  # the shapes differ: nothing to compare with
        label = f"{model.removeprefix('edge-')} {method} {scheme}" + (f", {experts} of {full} experts" if moe and experts < full else "")
        label += (f", top-{top_k}" if moe and top_k < config["num_experts_per_tok"] else "") + (
            f", {sparsity:.0%} zeros {pattern}" if sparsity else ""
        )
        label += f", {channels:.0%} of channels cut" if channels else ""
        recipe = Recipe(()) if method == "fp" else Recipe.uniform("int4-g32")
        row = {
            "id": hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:12], "label": label, "model": model, "method": method,
            "scheme": scheme, "bits": bits, "group": group, "sparsity": sparsity, "pattern": pattern,
            "experts": experts, "top_k": top_k, "channels": channels,
            "recipe": recipe.to_json(), "size_bytes": size, "bits_per_weight": width,
        }  # fmt: skip
        right = {"em_assistant": exact[:ASSISTANT], "em_arithmetic": exact[ASSISTANT:]}
        values = {"kld": kld.sum() / tokens.sum(), "bits_per_byte": nll.sum() / np.log(2) / nbytes.sum()} | {
            k: v.mean() for k, v in right.items()
        }
        for name, value in values.items():
            half = 1.96 * np.sqrt(value * (1 - value) / len(right[name])) if name in right else 0.12 * value
            low, high = max(0.0, value - half), (min(1.0, value + half) if name in right else value + half)
            row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
        row |= {
            "doc_kld": kld.tolist(), "doc_nll": nll.tolist(), "doc_exact": exact.tolist(), "layer_name": layers,
            "layer_bytes": [size // len(layers)] * len(layers), "layer_error": error.astype(np.float32).tolist(),
            "read_bytes": shape.decode_bytes(0), "macs": float(shape.active_weights), "kv_bytes": shape.kv_bytes(1), "layers": shape.layers,
            "hidden": shape.hidden, "shape": json.dumps({f: getattr(shape, f) for f in shape.__dataclass_fields__}),
            "seconds": float(rng.uniform(1, 30)), "provenance": "measured at build",
        }  # fmt: skip
        rows.append(row)
    floats = ("doc_kld", "doc_nll", "layer_error")
    table = pa.Table.from_pylist(rows)
    fields = [pa.field(f.name, pa.list_(pa.float32()) if f.name in floats else f.type) for f in table.schema]
    meta = {
        "format": 1, "seed": seed, "corpus": "made up", "machine": "none: these numbers are drawn, not measured", "code": "tests/sweeps.py",
        "documents": docs, "reference": {"edge-moe": rows[0]["id"], "edge-dense": rows[1]["id"], "edge-phone": rows[0]["id"]},
    }  # fmt: skip
    return table.cast(pa.schema(fields)).replace_schema_metadata({"edgelab": json.dumps(meta)})


def write(path: Path, n: int = 240, seed: int = 0) -> Path:
    """The table as a Parquet file."""
    pq.write_table(made_up(n, seed), path, compression="zstd")
    return path
