"""Sparse storage: round trips to the bit, bytes counted by hand and by the arrays, files whole or not at all; kernels = twins."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgelab.kernels import simd
from edgelab.kernels.reference import BOUNDS, PAIRS, sparse_weight
from edgelab.kernels.sparse import bitmap_matmul, bits, columns, csr_matmul
from edgelab.methods.prune import keep_n_of_m
from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.sparse import FORMATS, Bitmap, Bsr, Csr, NOfM, decode, encode, load_sparse, predicted_bytes, save_sparse
from edgelab.scheme import QuantScheme


def pruned(*shape: int, sparsity: float = 0.5, two_of_four: bool = False) -> torch.Tensor:
    w = torch.randn(shape)
    if two_of_four:
        return w.masked_fill(~keep_n_of_m(w.abs(), 2, 4), 0.0)
    return w.masked_fill(torch.rand(shape) < sparsity, 0.0)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (16, 32), (3, 8, 300), (2, 5, 12)])
@pytest.mark.parametrize("form", FORMATS)
def test_floats_come_back_to_the_bit(form, shape, dtype):
    w = pruned(*shape, two_of_four=form == "n:m").to(dtype)
    w[..., 0, :] = 0  # a row of which nothing is left
    sparse = encode(w, form, block=(1, 4))
    back = decode(sparse)
    assert same_bits(back, w.float().numpy())
    assert sparse.values.kind == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int3-g16", "int2-tensor", "nf4-g32", "fp4-row", "mxfp4-g32"])
@pytest.mark.parametrize("form", FORMATS)
def test_codes_come_back_with_their_scales(form, scheme):
    q = round_to_nearest(pruned(2, 6, 64, two_of_four=True), QuantScheme.parse(scheme))
    sparse = encode(q, form, block=(2, 8))
    back = decode(sparse)
    assert back.scheme == q.scheme and same_bits(back.codes(), q.codes()) and same_bits(back.scales, q.scales)
    values = q.dequantize()
    assert sparse.values.count < q.codes().size or form == "bsr"
    np.testing.assert_array_equal(back.dequantize(), values)


@pytest.mark.parametrize("form", FORMATS)
def test_everything_or_nothing_left(form):
    zeros, full = torch.zeros(4, 8), torch.ones(4, 8)
    assert same_bits(decode(encode(zeros, form, block=(2, 2))), zeros.numpy())
    if form != "n:m":
        assert same_bits(decode(encode(full, form, block=(2, 2))), full.numpy())


def test_another_kind_rounds_and_zeros_lose_their_sign():
    w = np.array([[1 + 2.0**-20, -0.0, 1e-30, -3.0]], np.float32)
    half = encode(w, kind="float16")
    assert half.values.data.tolist() == [1.0, -3.0]  # 1e-30 underflows: it is a zero, and none is stored
    assert decode(half).tolist() == [[1.0, 0.0, 0.0, -3.0]] and not np.signbit(decode(half)[0, 1])
    assert decode(encode(w, kind="bfloat16")).tolist()[0][::3] == [1.0, -3.0]


def test_csr_is_scipys():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    w = pruned(20, 300, sparsity=0.9).numpy()
    ours, theirs = encode(w, "csr"), scipy_sparse.csr_matrix(w)
    np.testing.assert_array_equal(ours.ends, theirs.indptr)
    np.testing.assert_array_equal(ours.columns, theirs.indices)
    np.testing.assert_array_equal(ours.values.data, theirs.data)
    blocks, theirs = encode(w, "bsr", block=(4, 10)), scipy_sparse.csr_matrix(w).tobsr((4, 10))
    theirs.sort_indices()
    np.testing.assert_array_equal(blocks.columns, theirs.indices)
    np.testing.assert_array_equal(blocks.values.data.reshape(-1, 4, 10), theirs.data)


def test_layouts_by_hand():
    w = torch.tensor([[0, 5, 0, 7, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 2, 3]], dtype=torch.float16)
    assert encode(w).mask.tolist() == [[0b00011010], [0b11000000]]
    csr = encode(w, "csr")
    assert csr.ends.tolist() == [0, 3, 5] and csr.columns.tolist() == [1, 3, 4, 6, 7]
    # 2:4: groups (0 5 0 7) places 1, 3; (1 0 0 0) place 0 and, to fill up, 1; (0 0 0 0) 0, 1; (0 0 2 3) 2, 3
    two = encode(w, "n:m")
    assert two.packed.tolist() == [[0b0100_1101], [0b1110_0100]] and two.values.data.tolist() == [5, 7, 1, 0, 0, 0, 2, 3]
    blocks = encode(w, "bsr", block=(2, 2))
    assert blocks.columns.tolist() == [0, 1, 2, 3] and blocks.values.data[:4].tolist() == [0, 5, 0, 0]


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_by_arithmetic():
    """A mask of exactly a half: 9 bits per weight; csr 16 / 2 + 16 / 2 and the ends; 2:4 16 / 2 + 1; int4: 1 + 2 + 1/2."""
    w = pruned(64, 512, two_of_four=True)
    assert encode(w, kind="float16").bits_per_weight == 9.0
    assert encode(w, "n:m", kind="float16").bits_per_weight == 9.0
    assert encode(w, "csr", kind="float16").nbytes == 64 * 256 * 2 + 64 * 256 * 2 + 65 * 2
    q = round_to_nearest(w.where(w == 0, w.sign()), QuantScheme.parse("int4-g32"))  # no weight rounds to zero
    assert encode(q).bits_per_weight == 3.5 and q.bits_per_weight == 4.5
    assert encode(q, "n:m").bits_per_weight == 0.5 * 4 + 1 + 0.5


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int4-g32", "int8-row", "mxfp4-g32"])
@pytest.mark.parametrize("shape", [(2, 32), (6, 64), (2, 10, 320), (16, 96), (300, 256)])
@pytest.mark.parametrize("form", FORMATS)
def test_prediction_equals_the_arrays(form, shape, kind):
    w = pruned(*shape, two_of_four=True)
    w[..., :2, :] = 0
    given = w if "-" not in kind else round_to_nearest(w, QuantScheme.parse(kind))
    sparse = encode(given, form, kind=None if "-" in kind else kind, block=(2, 8))
    arrays = [a for a in (*vars(sparse).values(), *vars(sparse.values).values()) if isinstance(a, np.ndarray)]
    assert sparse.nbytes == sum(a.nbytes for a in arrays)
    stored = sparse.values.count // 16 if form == "bsr" else sparse.values.count
    assert predicted_bytes(form, shape, stored, kind, block=(2, 8)) == sparse.nbytes


@pytest.mark.parametrize(("n", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_the_smallest_index_that_fits(n, kind):
    w = np.zeros((1, n), np.float16)
    w[0, -1] = 1
    sparse = encode(w, "csr")
    assert sparse.columns.dtype == kind and decode(sparse)[0, -1] == 1


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_holds_all_of_it(tmp_path):
    w, q = pruned(4, 64, two_of_four=True), round_to_nearest(pruned(3, 4, 64), QuantScheme.parse("int4-g32"))
    given = {
        "a.bitmap": encode(w, kind="bfloat16"),
        "a.csr": encode(w, "csr", kind="float16"),
        "a.bsr": encode(w, "bsr", block=(2, 4)),
        "a.two": encode(w, "n:m"),
        "experts": encode(q),
        "nothing": encode(torch.zeros(2, 8), "csr"),
    }
    save_sparse(tmp_path / "s.safetensors", given)
    found = load_sparse(tmp_path / "s.safetensors")
    assert list(found) == list(given) and [type(f) for f in found.values()] == [Bitmap, Csr, Bsr, NOfM, Bitmap, Csr]
    for name, sparse in given.items():
        assert found[name].nbytes == sparse.nbytes and found[name].shape == sparse.shape
        a, b = decode(found[name]), decode(sparse)
        assert same_bits(a.codes(), b.codes()) if name == "experts" else same_bits(a, b)
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    save_sparse(file, {"a": encode(pruned(2, 8))})
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("edgelab.methods.sparse.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sparse(file, {"a": encode(pruned(4, 8))})
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["s.safetensors"]


def test_a_broken_file_is_refused(tmp_path):
    file = tmp_path / "s.safetensors"
    save_sparse(file, {"a": encode(pruned(4, 64), "csr")})
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="is no whole safetensors file of sparse weights"):
        load_sparse(file)
    save_file({"x": np.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no sparse weights"):
        load_sparse(file)
    meta = '{"a": {"form": "bitmap", "shape": [2, 8], "kind": "float16", "count": 3}}'
    save_file({"a:values": np.zeros(3, np.float16), "a:mask": np.full((2, 1), 3, np.uint8)}, file, {"edgelab_sparse": meta})
    with pytest.raises(ValueError, match=re.escape("a has 3 values for 4 places of (2, 8)")):
        load_sparse(file)
    save_file({"a:values": np.zeros(3, np.float16)}, file, {"edgelab_sparse": meta})
    with pytest.raises(ValueError, match="the parts of a are not all there"):
        load_sparse(file)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: encode(torch.ones(2, 4), "coo"), "form='coo' is not known; use one of bitmap, csr, bsr, n:m"),
        (lambda: encode(torch.ones(4)), "weight is (4,); it must be [out, in]"),
        (lambda: encode(torch.ones(2, 4).int()), "kind='int32' of a weight of int32"),
        (lambda: encode(torch.tensor([[torch.nan, 1.0]])), "weight holds 1 NaN"),
        (lambda: encode(torch.tensor([[1e6, 1.0]]), kind="float16"), "weight holds 1e+06, which kind='float16' can't hold"),
        (lambda: encode(torch.ones(2, 8), "n:m"), "row 0 has 4 values in inputs 0 .. 3; prune with Prune(pattern='2:4')"),
        (lambda: encode(torch.ones(2, 6), "n:m"), "m must divide in_features=6"),
        (lambda: encode(torch.ones(2, 6), "bsr", block=(2, 4)), "block=(2, 4) does not divide a weight of 2 rows and 6 inputs"),
        (lambda: encode(round_to_nearest(torch.ones(2, 32), QuantScheme.parse("uint4-g32"))), "uint4-g32 has no exact zero"),
        (lambda: save_sparse("x", {"a:b": encode(torch.ones(2, 4))}), "the name 'a:b' holds ':'"),
        (lambda: predicted_bytes("coo", (2, 4), 3), "form='coo' is not known"),
        (lambda: bits(np.zeros((2, 2), np.uint8), np.zeros(0, np.float16), 8), "n=8 places a row need uint8 [rows, 1]"),
        (lambda: bits(np.full((2, 1), 3, np.uint8), np.zeros(3, np.float16), 8), "the 4 bits of the mask need float16 (4,)"),
        (lambda: columns(np.array([0, 2]), np.array([1, 9]), np.zeros(2, np.float16), 8), "an index is 9; columns are 0 .. 7"),
        (lambda: columns(np.array([0, 3]), np.array([1, 2]), np.zeros(2, np.float16), 8), "do not rise from 0 to the 2 indices"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


# -------------------------------------------------------------------------------------------------------------- kernels

KERNELS = ["bitmap_matmul", "csr_matmul"]
# one of each, odd everything, no row of x, whole units of 64 and beside them, every block of rows of x, rows of x far apart
SIZES = [(1, 1, 1), (7, 61, 2), (5, 64, 1), (9, 65, 3), (33, 128, 0), (20, 300, 17), (40, 1024, 64), (12, 4096, 5)]
SIZES += [(6, 70, tokens) for tokens in (4, 7, 8, 15, 16, 31, 33)]


def both(name: str, **sizes):
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(3), **sizes)
    kernel(*args)
    comp, ref = args[-1].copy(), args[-1]
    ref[:] = np.nan
    reference(*args)
    return comp, ref, BOUNDS[name](*args)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_equals_its_twin(name, sparsity):
    for out, n, tokens in SIZES:
        comp, ref, bound = both(name, out=out, n=n, tokens=tokens, sparsity=sparsity)
        assert comp.shape == (tokens, out) and (np.abs(comp - ref) <= bound).all(), (out, n, tokens)


@pytest.mark.parametrize("name", KERNELS)
def test_whole_numbers_are_exact(name):
    for out, n, tokens in SIZES:
        comp, ref, _ = both(name, out=out, n=n, tokens=tokens, exact=True)
        np.testing.assert_array_equal(comp, ref)


@pytest.mark.parametrize("name", KERNELS)
def test_every_float16_is_read_as_it_is(name):
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half) & (half != 0)]
    w = half[:, None]
    for tokens in (1, 3):
        y = np.full((tokens, len(w)), np.nan, np.float32)
        if name == "bitmap_matmul":
            bitmap_matmul(bits(np.ones((len(w), 1), np.uint8), half, 1), np.ones((tokens, 1), np.float32), y)
        else:
            csr_matmul(columns(np.arange(len(w) + 1), np.zeros(len(w), np.uint8), half, 1), np.ones((tokens, 1), np.float32), y)
        np.testing.assert_array_equal(y, np.broadcast_to(half.astype(np.float32), y.shape))


def test_what_is_encoded_is_what_the_kernels_multiply():
    w, x = pruned(24, 100).half(), np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    bitmap, csr = encode(w), encode(w, "csr")
    for kernel, made in (
        (bitmap_matmul, bits(bitmap.mask, bitmap.values.data, 100)),
        (csr_matmul, columns(csr.ends, csr.columns, csr.values.data, 100)),
    ):
        np.testing.assert_array_equal(sparse_weight(made), w.double().numpy())
        y = np.empty((2, 24), np.float32)
        kernel(made, x, y)
        np.testing.assert_allclose(y, x @ w.float().numpy().T, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=re.escape("x (2, 99) and y (2, 24) do not fit a weight [24, 100]")):
            kernel(made, np.ascontiguousarray(x[:, :99]), y)
        with pytest.raises(ValueError, match="must be contiguous float32"):
            kernel(made, x.T.copy().T, y)


@pytest.mark.parametrize("way", [w for w in simd.ways() if w in ("avx2", "portable")])
def test_other_processors_give_the_same(way):
    code = f"""
import numpy as np
from edgelab.kernels.reference import BOUNDS, PAIRS
for name in {KERNELS}:
    kernel, reference, make = PAIRS[name]
    for out, n, tokens in {SIZES}:
        args = make(np.random.default_rng(0), out=out, n=n, tokens=tokens)
        kernel(*args)
        comp = args[-1].copy()
        reference(*args)
        assert (np.abs(comp - args[-1]) <= BOUNDS[name](*args)).all(), (name, out, n, tokens)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"EDGELAB_SIMD": way}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
