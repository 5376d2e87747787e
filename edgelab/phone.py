"""Make the model for a phone, `data/edge-phone`, from `data/edge-moe`: `python -m edgelab.phone`.

The recipe is `Recipe.phone()`: half of the experts go, the rest learns from the original, 2.85 bits per weight are spent where
they count, and the scales learn again. Everything it reads is built on the spot (`edgelab.data`) from the training and
calibration splits; the test split is read once, for the report that the bundle carries. An interrupted run goes on
where it was.
"""

import json
from pathlib import Path

from edgelab import data
from edgelab.bundle import coverage_of, save_bundle
from edgelab.compress import compress
from edgelab.evaluate import evaluate
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.recipe import Recipe

CALIBRATION_TOKENS = 65_536
TRAINING_TOKENS = 4_000_000
CONTEXT = 256  # of training sequences: documents are short, and a step of 8 takes half a second on one core
DOCS = {"prose": 180, "code": 150, "assistant": 500, "arithmetic": 500}


def build(out: Path, *, source: Path | None = None, folder: Path | None = None, docs=DOCS, progress: bool = True) -> Path:
    """The path of the bundle, written whole or not at all. `folder`: checkpoints and curves of the learning steps."""
    source = source or data_dir() / "edge-moe"
    model, tokenizer, corpus = load(source), load_tokenizer(source), data.corpus()
    calibration = data.calibration_batches(tokenizer, corpus["calibration"], tokens=CALIBRATION_TOKENS)
    training = data.calibration_batches(tokenizer, corpus["train"], tokens=TRAINING_TOKENS, context=CONTEXT)
    made = compress(model, Recipe.phone(), calibration=calibration, training=training, folder=folder, progress=progress)
    sizes = {"fp": sum(f.stat().st_size for f in source.glob("*.safetensors")), "phone": made.coverage.predicted_bytes}
    report = evaluate(
        {"fp": model, "phone": made.model}, tokenizer, corpus["test"], max_docs=docs, speed=False, sizes=sizes, progress=progress
    )
    return save_bundle(made.model, tokenizer, out, recipe=made.recipe, coverage=made.coverage, report=report)


def main() -> None:
    import argparse

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, help="the bundle (default: data/edge-phone)")
    p.add_argument("--work", type=Path, default=Path(".pretrain/phone"), help="checkpoints and curves of the learning steps")
    a = p.parse_args()
    out = build(a.out or data_dir() / "edge-phone", folder=a.work)
    print(json.dumps({"bundle": str(out), "bytes": coverage_of(out).file_bytes}))


if __name__ == "__main__":
    main()
