"""The vision path: costs are counted, integers are exact, and ONNX Runtime computes from the file what torch computes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgelab.export import ExportError
from edgelab.fold import fold
from edgelab.kernels.histogram import add, empty
from edgelab.vision import (
    Codes,
    Images,
    Layer,
    Pool,
    Seen,
    Split,
    Static,
    adapted,
    chain,
    conv_madds,
    correct,
    cost_table,
    counted_madds,
    digits,
    latencies_ms,
    logits,
    madds,
    network,
    parameters,
    resize,
    resolution_for,
    resolution_table,
    static,
    static_table,
    statics,
    train,
    wilson,
)


def shapes(n: int, seed: int) -> Images:
    """Ten classes that can be told apart: noisy copies of ten fixed patterns."""
    coarse = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(7)).round()
    patterns = F.pad(coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., 1:-1, 1:-1], (1, 1, 1, 1))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=draw)
    return Images((patterns[labels] + 0.1 * torch.randn(n, 1, 8, 8, generator=draw)).clamp(0, 1), labels)


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(shapes(512, 1), shapes(100, 2), shapes(300, 3))


def on_one_thread(work):
    """Training repeats exactly only on as many threads, and the tests below are about these very networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def nets(split) -> dict[str, nn.Sequential]:
    made = {"standard": network(width=4), "separable": network(True, width=4)}
    for net in made.values():
        on_one_thread(lambda net=net: train(net, split.train, epochs=10))
    return made


# ------------------------------------------------------------------------------------------------------------------ data


def test_digits_are_split_by_digit_and_the_same_for_the_same_seed():
    pytest.importorskip("sklearn", reason="the extra `vision` is not installed")
    one, again, other = digits(3), digits(3), digits(4)
    for part in ("train", "calibration", "test"):
        assert torch.equal(getattr(one, part).pixels, getattr(again, part).pixels)
    assert not torch.equal(one.test.pixels, other.test.pixels)
    assert (len(one.train), len(one.calibration), len(one.test)) == (899, 179, 719) and one.train.pixels.shape == (899, 1, 8, 8)
    assert float(one.train.pixels.min()) == 0 and float(one.train.pixels.max()) == 1
    counts = [torch.bincount(p.labels, minlength=10) for p in (one.train, one.test)]
    assert ((counts[1] / (counts[0] + counts[1])) - 4 / 9).abs().max() < 0.01
    everything = torch.cat([one.train.pixels, one.calibration.pixels, one.test.pixels])
    assert len(everything) == 1797 == len({x.numpy().tobytes() for x in everything})
    with pytest.raises(ValueError, match=r"test=0.8 and calibration=0.3 must be shares"):
        digits(test=0.8, calibration=0.3)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "edgelab\[vision\]"'):
        digits()


def naive_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The rule written out: a weighted mean over old pixels, by a triangle one old pixel wide, or one new pixel where that is wider."""
    n = len(image)
    ratio = n / size
    reach = max(1.0, ratio)
    weights = np.zeros((size, n))
    for i in range(size):
        centre = (i + 0.5) * ratio - 0.5
        for j in range(math.floor(centre - reach) - 1, math.ceil(centre + reach) + 2):
            w = max(0.0, 1 - abs(j - centre) / reach)
            if ratio <= 1:
                weights[i, min(max(j, 0), n - 1)] += w  # edges repeated
            elif 0 <= j < n:
                weights[i, j] += w  # nothing beyond: the weights inside are normalised
    weights /= weights.sum(1, keepdims=True)
    return weights @ image @ weights.T


@pytest.mark.parametrize("size", [3, 4, 6, 8, 12, 16, 23])
def test_resize_follows_its_rule(size):
    image = np.random.default_rng(0).random((8, 8))
    got = resize(torch.from_numpy(image)[None, None], size)[0, 0].numpy()
    np.testing.assert_allclose(got, naive_resize(image, size), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        resize(torch.zeros(1, 1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"pixels are \(8, 8\); they must be"):
        resize(torch.zeros(8, 8), 4)


# ------------------------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("size", [4, 7, 8, 16])
def test_three_ways_to_count_multiply_adds_agree(separable, size):
    net = network(separable, width=4).eval()
    x = torch.rand(3, 1, size, size)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(x)
    assert madds(net, size) == counted_madds(net, x) == flops.get_total_flops() / 2 / 3


def test_the_formula_with_stride_dilation_and_groups():
    conv = nn.Conv2d(6, 9, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=3)
    count, h, w = conv_madds(conv, 11, 13)
    x = torch.rand(1, 6, 11, 13)
    assert conv(x).shape == (1, 9, h, w) and count == counted_madds(conv, x)
    with pytest.raises(ValueError, match="an image of 2 x 2 is too small"):
        conv_madds(nn.Conv2d(1, 1, 3), 2, 2)


def test_separable_convolutions_cost_the_share_that_the_paper_says():
    before, after, k = 16, 32, 3
    whole, *_ = conv_madds(nn.Conv2d(before, after, k, padding=1), 8, 8)
    depthwise, *_ = conv_madds(nn.Conv2d(before, before, k, padding=1, groups=before), 8, 8)
    pointwise, *_ = conv_madds(nn.Conv2d(before, after, 1), 8, 8)
    assert (depthwise + pointwise) / whole == pytest.approx(1 / after + 1 / k**2)


def test_cost_table(nets, split):
    standard, separable = cost_table(nets, split.test, turns=3)
    assert standard["madds"] == madds(nets["standard"], 8) > 4 * separable["madds"]
    assert separable["madds_share"] == separable["madds"] / standard["madds"] and standard["latency_share"] == 1
    assert standard["parameters"] == parameters(nets["standard"])
    for row in (standard, separable):
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] and row["n"] == 300
        assert 0 < row["latency_ms_low"] <= row["latency_ms"] <= row["latency_ms_high"]


def test_latency_is_of_the_call():
    x = torch.rand(300, 300)
    found = latencies_ms({"one": lambda: x @ x, "eight": lambda: [x @ x for _ in range(8)]}, turns=5)
    assert 3 < np.median(found["eight"] / found["one"]) < 20


def test_wilson_covers_what_it_says():
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1 and 0.1 < wilson(0, 20)[1] < 0.2
    draws = np.random.default_rng(0).binomial(200, 0.97, 4000)
    covered = np.mean([low <= 0.97 <= high for low, high in (wilson(int(k), 200) for k in draws)])
    assert 0.93 < covered < 0.98
    with pytest.raises(ValueError, match="hits=3 of n=2"):
        wilson(3, 2)


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Linear(2, 2), "model is a Linear; this path takes an nn.Sequential"),
        (nn.Sequential(nn.Conv1d(1, 1, 1)), "0 is a Conv1d"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "0 pools to 2"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"))), "0.0 pads with 'zeros', 'same'"),
        (nn.Sequential(nn.Flatten(0)), "0 flattens dimensions 0 .. -1"),
    ],
)
def test_what_is_no_chain_is_named(net, says):
    with pytest.raises(TypeError, match=says):
        chain(net)


# -------------------------------------------------------------------------------------------------------------- training


def test_training_repeats_and_learns(split, nets):
    assert correct(nets["standard"], split.test).mean() > 0.9
    again = network(width=4)
    assert not any(m.training for m in nets["standard"].modules())
    losses = on_one_thread(lambda: train(again, split.train, epochs=10))
    assert losses[-1] < losses[0] / 2
    for a, b in zip(again.parameters(), nets["standard"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="epochs=0 and batch=64"):
        train(again, split.train, epochs=0)


# ----------------------------------------------------------------------------------------------------------- INT8 static


def naive_static(q: Static, image: np.ndarray) -> np.ndarray:
    """Logits of one image [c, h, w], in Python integers and loops over positions."""

    def rounded(value: np.float32) -> int:
        return int(np.rint(value))

    first = q.steps[0].before
    x = np.array([[[min(255, max(0, rounded(v / np.float32(first.scale)) + first.zero)) for v in row] for row in c] for c in image])
    for step in q.steps:
        if isinstance(step, Pool):
            factor = np.float32(step.before.scale) / (np.float32(step.after.scale) * np.float32(x[0].size))
            sums = [int((c - step.before.zero).sum()) for c in x]
            x = np.array([[[min(255, max(0, rounded(np.float32(s) * factor) + step.after.zero))]] for s in sums])
            continue
        w, unit = step.signed().astype(int), np.float32(step.before.scale) * step.scales()
        if not step.settings:
            flat = x.reshape(-1) - step.before.zero
            return np.array([np.float32(int(flat @ row) + int(b)) * u for row, b, u in zip(w, step.bias, unit, strict=True)])
        (s, _), (p, _), g = step.settings["stride"], step.settings["padding"], step.settings["groups"]
        k, inner, outer = w.shape[2], w.shape[1], len(w) // step.settings["groups"]
        padded = np.pad(x - step.before.zero, ((0, 0), (p, p), (p, p)))
        size = (padded.shape[1] - k) // s + 1
        out = np.zeros((len(w), size, size), int)
        for o in range(len(w)):
            own = padded[o // outer * inner : (o // outer + 1) * inner]
            factor = unit[o] / np.float32(step.after.scale)
            for i in range(size):
                for j in range(size):
                    acc = int((own[:, i * s : i * s + k, j * s : j * s + k] * w[o]).sum()) + int(step.bias[o])
                    out[o, i, j] = min(255, max(0, rounded(np.float32(acc) * factor) + step.after.zero))
        assert g == step.settings["groups"]
        x = out
    raise AssertionError("no linear layer at the end")


@pytest.mark.parametrize("kind", ["standard", "separable"])
def test_static_computes_in_integers_what_loops_do(kind, nets, split):
    q = static(nets[kind], split.calibration.pixels, "kl")
    x = split.test.pixels[:4]
    np.testing.assert_array_equal(logits(q, x).numpy(), np.stack([naive_static(q, image.numpy()) for image in x]))
    assert all(codes.dtype == torch.uint8 for _, codes in list(q.trace(x))[:-1])


def test_static_follows_the_float_model(nets, split):
    for kind, net in nets.items():
        for rule, q in statics(net, split.calibration.pixels).items():
            ref, got = logits(net, split.test.pixels), logits(q, split.test.pixels)
            assert (ref.argmax(-1) == got.argmax(-1)).double().mean() > 0.97, (kind, rule)
            assert 0 < (ref - got).abs().max() < 0.25 * ref.abs().max()
            assert all(s.before.zero == 0 for s in q.steps)  # every input of a layer is an image or comes from a ReLU


def test_codes_are_those_of_the_qtensor(nets, split):
    q = static(nets["standard"], split.calibration.pixels)
    folded = fold(nets["standard"]).model
    for step in q.steps:
        if isinstance(step, Layer):
            w = folded.get_submodule(step.name).weight.detach()
            assert step.signed().min() >= -127 and np.abs(step.signed()).reshape(len(w), -1).max(1).min() == 127
            step_of = step.weight.scale_values().reshape(-1, *[1] * (w.ndim - 1))
            assert np.abs(step.weight.dequantize().reshape(w.shape) - w.numpy()).max() <= 0.51 * step_of.max()
    half = static(nets["standard"], split.calibration.pixels, weight_top=64)
    assert max(np.abs(s.signed()).max() for s in half.steps if isinstance(s, Layer)) == 64
    one = static(nets["standard"], split.calibration.pixels, weights="int8-tensor")
    assert all(s.weight.scales.size == 1 for s in one.steps if isinstance(s, Layer)) and one.nbytes < q.nbytes


def test_values_below_zero_get_codes_around_128(split):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    q = static(net, split.calibration.pixels - 0.5)
    assert [s.before.zero for s in q.steps] == [128, 128, 0, 0]
    x = split.test.pixels - 0.5
    np.testing.assert_array_equal(logits(q, x[:3]).numpy(), np.stack([naive_static(q, image.numpy()) for image in x[:3]]))
    assert (logits(q, x) - logits(net, x)).abs().max() < 0.1 * logits(net, x).abs().max()


def test_ranges_come_from_the_rules():
    x = np.concatenate([np.random.default_rng(0).exponential(1, 20000), [60.0]]).astype(np.float32)
    seen = Seen(add(empty(4096), x), 60.0, False)
    top = {rule: 255 * seen.codes(rule).scale for rule in ("max", "percentile", "mse", "kl")}
    assert top["max"] == pytest.approx(60, rel=1e-6) and top["percentile"] == pytest.approx(np.quantile(x, 0.9999), rel=0.1)
    assert top["kl"] < 20 < top["max"] and top["mse"] < top["max"]
    signed = Seen(seen.histogram, 60.0, True)
    assert signed.codes("max") == Codes(float(np.float32(60 / 127)), 128)
    with pytest.raises(ValueError, match="rule='best' is not known; use one of max, percentile, mse, kl"):
        seen.codes("best")


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), r"start with a Conv2d and end with a Linear .* its layers are 0 \(Conv2d, ReLU\)"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 1)), "the ReLU 0 follows no convolution"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 2)),
            "the norm 2 can't be folded .*reads a ReLU",
        ),
    ],
)  # fmt: skip
def test_what_integers_can_not_do_is_refused(net, says, split):
    with pytest.raises(ValueError, match=says):
        static(net.eval(), split.calibration.pixels)


def test_other_errors_of_static(nets, split):
    net, x = nets["standard"], split.calibration.pixels
    for call, says in (
        (lambda: static(net, x, weights="int4-g32"), "weights='int4-g32' must be int8-row"),
        (lambda: static(net, x, weight_top=128), r"weight_top=128 must be 1 .. 127"),
        (lambda: static(net, x[:0]), "calibration holds no images"),
        (lambda: static(net, torch.zeros(4, 1, 8, 8)), "leave the input of 0 at zero"),
        (lambda: static(network(), x), "in training mode"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_static_table(nets, split):
    rows = static_table(nets["standard"], split, rules=("max", "kl"))
    ways = [(w, a) for w in ("int8-row", "int8-tensor") for a in ("uint8, max", "uint8, kl")]
    assert [(r["weights"], r["activations"]) for r in rows] == [("float32", "float32"), *ways]
    for row in rows[1:]:
        assert round((row["accuracy"] - rows[0]["accuracy"]) * row["n"]) == row["won"] - row["lost"]
        assert 0 < row["kld_low"] <= row["kld"] <= row["kld_high"] and row["bytes"] < 0.4 * rows[0]["bytes"]


# ------------------------------------------------------------------------------------------------------------ resolution


def test_adapting_takes_the_statistics_of_the_size(nets, split):
    net = nets["standard"]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    twin = adapted(net, split.train.pixels, 16)
    seen = net[0](resize(split.train.pixels, 16))  # what the first norm normalizes
    torch.testing.assert_close(twin[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(twin[1].running_var, seen.var((0, 2, 3)), rtol=2e-2, atol=1e-4)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))
    assert not any(m.training for m in twin.modules()) and twin[1].momentum == net[1].momentum
    with pytest.raises(ValueError, match="no batch norm to adapt"):
        adapted(fold(net).model, split.train.pixels, 16)


def test_resolution_table_and_the_choice(nets, split):
    rows = resolution_table(nets["standard"], split, (4, 8, 16), turns=3)
    assert [r["size"] for r in rows] == [4, 8, 16] and [r["madds"] for r in rows] == [madds(nets["standard"], s) for s in (4, 8, 16)]
    assert rows[2]["accuracy"] > rows[2]["accuracy_as_it_is"]  # trained at 8 x 8
    best = max(rows, key=lambda r: r["accuracy"])
    assert resolution_for(1e12, rows) == best["size"] and resolution_for(rows[0]["madds"], rows) == 4
    tied = [{"size": 8, "madds": 10, "accuracy": 0.9}, {"size": 4, "madds": 5, "accuracy": 0.9}]
    assert resolution_for(10, tied) == 4
    with pytest.raises(ValueError, match=r"budget_madds=1 allows no size of the table; the cheapest size, 4, takes .* use a smaller model"):
        resolution_for(1, rows)


# ---------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize("kind", ["standard", "separable"])
def test_the_file_holds_our_codes_and_the_runtime_computes_in_integers(kind, nets, split, tmp_path, onnx):
    from edgelab.export.vision_onnx import executed, export, run

    q = static(nets[kind], split.calibration.pixels, "kl")
    result = export(q, tmp_path / "q.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(result.files[0])).graph.initializer}
    layers = [s for s in q.steps if isinstance(s, Layer)]
    for step in layers:
        codes = held[f"{step.name}.weight"].astype(np.int16) + 128
        assert codes.astype(np.uint8).reshape(step.weight.shape).tobytes() == step.weight.packed.tobytes()
        assert held[f"{step.name}.weight.scale"].astype(np.float16).tobytes() == step.weight.scales.tobytes()
    ran = executed(result.files[0])
    assert ran["QLinearConv"] == len(layers) - 1 and ran["QGemm"] == 1 and not ran["Conv"] + ran["Relu"] + ran["BatchNormalization"]
    assert result.weights_quantized == sum(s.weight.packed.size for s in layers) and result.parity["top1_agreement"] == 1
    assert "x64quantprecision" in " ".join(result.notes) and "QLinearConv" in " ".join(result.notes)
    for size in (5, 8, 13):
        x = resize(split.test.pixels, size)
        ours, theirs = logits(q, x).numpy(), run(result.files[0])(x.numpy())
        # 0 on the machine this was written on; a tie that another processor's float product rounds the other way moves one code
        assert (ours == theirs).all(1).mean() > 0.95 and (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.99


def test_half_the_range_needs_no_option(nets, split, tmp_path, onnx):
    from edgelab.export.vision_onnx import export, run, session_options

    q = static(nets["standard"], split.calibration.pixels, weight_top=64)
    assert session_options(q) == {} == session_options(nets["standard"])
    result = export(q, tmp_path)
    assert result.files == (tmp_path / "model.onnx",) and not any("x64quantprecision" in n for n in result.notes)
    ours, theirs = logits(q, split.test.pixels).numpy(), run(result.files[0], {})(split.test.pixels.numpy())
    assert (ours == theirs).all(1).mean() > 0.95


def test_float_files_folded_and_not(nets, tmp_path, onnx):
    from edgelab.export.vision_onnx import executed, export

    plain = export(nets["standard"], tmp_path / "plain.onnx")
    folded = export(fold(nets["standard"]).model, tmp_path / "folded.onnx")
    nodes = [{n.op_type for n in onnx.load(str(r.files[0])).graph.node} for r in (plain, folded)]
    assert "BatchNormalization" in nodes[0] and "BatchNormalization" not in nodes[1] and folded.bytes < plain.bytes
    assert executed(plain.files[0]) == executed(folded.files[0])  # ONNX Runtime folds as we do
    assert all(r.parity["cosine"] > 0.999999 and r.weights_quantized == 0 for r in (plain, folded))


def test_a_runtime_table(nets, split, tmp_path, onnx):
    from edgelab.export.vision_onnx import runtime_table

    net = fold(nets["standard"]).model
    rows = runtime_table({"float32": net, "int8": static(net, split.calibration.pixels)}, split.test, tmp_path, turns=3)
    assert [r["model"] for r in rows] == ["float32", "int8"] and rows[0]["bytes_share"] == 1 > rows[1]["bytes_share"]
    assert rows[1]["bytes"] == (tmp_path / "int8.onnx").stat().st_size and rows[1]["same"] > 0.99 and rows[0]["max_abs_diff"] < 1e-4
    assert abs(rows[0]["accuracy"] - correct(net, split.test).mean()) < 0.01


def damaged(onnx, source, target, name: str, edit):
    model = onnx.load(str(source))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(target))


@pytest.mark.parametrize("name", ["0.weight", "0.weight.scale", "3.bias", "3.scale", "image.zero"])
def test_a_changed_file_is_refused(name, nets, split, tmp_path, onnx):
    from dataclasses import replace

    from edgelab.export.vision_onnx import export, verify

    q = static(nets["standard"], split.calibration.pixels)
    result = export(q, tmp_path / "q.onnx", check=False)
    assert not result.parity and verify(result, q).parity

    def edit(a: np.ndarray) -> np.ndarray:
        flat = a.reshape(-1)
        flat[0] = flat[0] * 2 if a.dtype == np.float32 else flat[0] + 1
        return a

    damaged(onnx, tmp_path / "q.onnx", tmp_path / "bad.onnx", name, edit)
    with pytest.raises(ExportError, match=f"{name.replace('.scale', '')}.*not the|the scales in the file"):
        verify(replace(result, files=(tmp_path / "bad.onnx",)), q)


def test_a_failed_export_leaves_what_was_there(nets, split, tmp_path, onnx, monkeypatch):
    from edgelab.export import vision_onnx

    q = static(nets["standard"], split.calibration.pixels)
    good = vision_onnx.export(q, tmp_path / "q.onnx").files[0].read_bytes()
    monkeypatch.setattr(vision_onnx, "agreement", lambda *a, **k: {"cosine": 0.5, "top1_agreement": 1.0})
    with pytest.raises(ExportError, match=r"have cosine 0.500000 to torch's .*; 0.9999 and 99% are asked for"):
        vision_onnx.export(q, tmp_path / "q.onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["q.onnx"] and (tmp_path / "q.onnx").read_bytes() == good


def test_models_that_are_no_chain_are_refused(tmp_path, onnx):
    from edgelab.export.vision_onnx import export

    for net, says in (
        (nn.Linear(2, 2), "is a Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "must start with a Conv2d and end with a Linear"),
        (network(), "in training mode"),
    ):
        with pytest.raises(ExportError, match=says):
            export(net if "training" in says else net.eval(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- digits


def test_the_digits_from_training_to_the_runtime(tmp_path, onnx):
    pytest.importorskip("sklearn", reason="the extra `vision` is not installed")
    from edgelab.export.vision_onnx import export, run

    data = digits()
    net = network(width=8)
    train(net, data.train)
    right = correct(net, data.test)
    assert right.mean() > 0.97 and wilson(int(right.sum()), len(right))[0] > 0.96
    q = static(net, data.calibration.pixels, "kl")
    result = export(q, tmp_path / "digits.onnx")
    theirs = run(result.files[0])(data.test.pixels.numpy()).argmax(-1)
    assert (theirs == data.test.labels.numpy()).mean() > right.mean() - 0.01
    assert (theirs == logits(q, data.test.pixels).argmax(-1).numpy()).mean() > 0.998
    assert result.bytes < 0.35 * export(fold(net).model, tmp_path / "float.onnx").bytes
