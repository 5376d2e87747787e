"""The metrics as `evaluate.Metric` modules of ours: `metrics.load("bits_per_byte")` needs no network.

Each is a folder with one self-contained module of the same name, so that `evaluate.load(metrics.path(name))` works
too, from a notebook or another project. The arithmetic is a plain function in that module; `edgelab.evaluate` calls
the function, the `Metric` class is its door to the Hugging Face world.
"""

from pathlib import Path

NAMES = ("perplexity", "bits_per_byte", "kl_divergence", "same_top_token", "exact_match", "router_overlap")


def path(name: str) -> str:
    """The folder of the metric `name`, as `evaluate.load` takes it. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"metric {name!r} is not one of {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)


def load(name: str):
    """The metric `name` as an `evaluate.Metric`.

    >>> load("bits_per_byte").compute(nll=[8.0], n_bytes=[4])["bits_per_byte"]  # 8 nats over 4 bytes: 2 / ln 2
    2.8853900817779268
    """
    import evaluate

    return evaluate.load(path(name))
