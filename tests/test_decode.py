"""`kernels/decode.py`: its jobs against their NumPy twins, on every way that this processor takes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgelab.kernels import simd
from edgelab.kernels.decode import BLOCK, QUERIES
from edgelab.kernels.reference import BOUNDS, PAIRS

HALF = [False] if simd.way() == "portable" else [False, True]


def both(name, **sizes):
    """The kernel's and the twin's output for the same arguments, and the bound."""
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(0), **sizes)
    kernel(*args)
    comp = args[-1].copy()
    ref = np.empty(comp.shape, np.float64)
    reference(*args[:-1], ref)
    return comp, ref, BOUNDS[name](*args)


@pytest.mark.parametrize("n", [1, 7, 16, 33, 256, 896])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rms_norm(n, tokens):
    comp, ref, bound = both("rms_norm", n=n, tokens=tokens)
    assert (np.abs(comp - ref) <= bound).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (64, 16), (16, 8), (2, 1)])
def test_rotate(dim, half, interleaved):
    comp, ref, bound = both("rotate", dim=dim, half=half, interleaved=interleaved)
    assert (np.abs(comp - ref) <= bound).all()


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("latent", [0, 48])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2), (7, 1), (2 * QUERIES + 1, 1), (6, 6)])
def test_attention(heads, key_heads, latent, half):
    for tokens, length in ((1, 1), (1, BLOCK), (1, BLOCK + 1), (3, 100), (20, 20), (BLOCK * 2, BLOCK * 3)):
        comp, ref, bound = both(
            "attention", heads=heads, key_heads=key_heads, dim=64, latent=latent, tokens=tokens, length=length, half=half
        )
        assert (np.abs(comp - ref) <= bound).all(), (tokens, length)
        assert np.abs(comp - ref).max() < 1e-5  # the bound allows for the worst of all roundings at once; 3e-7 was seen


def test_the_bound_of_attention_is_not_empty():
    """One position more or less is far outside of it."""
    kernel, reference, make = PAIRS["attention"]
    args = make(np.random.default_rng(0))
    kernel(*args)
    ref = np.empty(args[-1].shape, np.float64)
    reference(*args[:3], args[3] - 1, args[4], ref)
    assert (np.abs(args[-1] - ref) > BOUNDS["attention"](*args)).mean() > 0.8


def test_scores_that_overflow_exp_are_no_trouble():
    kernel, reference, make = PAIRS["attention"]
    q, keys, values, positions, _, y = make(np.random.default_rng(0))
    args = (q, keys, values, positions, np.array([40.0], np.float32))
    kernel(*args, y)
    ref = np.empty(y.shape, np.float64)
    reference(*args, ref)
    assert np.isfinite(y).all() and np.abs(y - ref).max() < 1e-2


def test_a_nan_shows_in_its_row_and_in_no_other():
    kernel, _, make = PAIRS["attention"]
    args = make(np.random.default_rng(0), tokens=3)
    kernel(*args)
    before = args[-1].copy()
    args[0][1, 2, 5] = np.nan
    kernel(*args)
    changed = np.isnan(args[-1])
    assert changed[1, 2].all() and changed.sum() == changed[1, 2].size
    assert np.array_equal(args[-1][~changed], before[~changed])


CODE = """
import numpy as np, test_decode, test_runtime
from edgelab.runtime import Runtime
from small_models import deepseek, qwen3, tiny
for n in (1, 33):
    test_decode.test_rms_norm(n, 2)
test_decode.test_rotate(16, 8, True)
for half in test_decode.HALF:
    for latent in (0, 48):
        test_decode.test_attention(7, 1, latent, half)
for config in (deepseek(2), qwen3(num_hidden_layers=1)):
    for scheme in ("int4-g32", "uint4-g32", None):
        model = tiny(config, scheme)
        rt = Runtime(model, activations="float32", kv="float32", context=80, chunk=32, threads=2)
        assert test_runtime.apart(rt.logits(test_runtime.IDS), test_runtime.reference(model, test_runtime.IDS)) < test_runtime.CLOSE
        quick = Runtime(model, context=80, threads=2)
        assert test_runtime.apart(quick.logits(test_runtime.IDS), test_runtime.reference(model, test_runtime.IDS)) < 0.3
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", [w for w in simd.ways() if w != simd.way()])
def test_every_other_way(way):
    here = Path(__file__).parent
    env = {**os.environ, simd.VARIABLE: way, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
