"""The claims that take hardware we do not have, modelled: phones, boards, a cloud; and what they cost (a function per claim).

Speeds, memory and energy are `device.predict`'s roofline, whose bands are where four of five held-out published measurements fell.
The model that the articles mean is described by its size only, 13 GB in 16 bits, so a dense one of 6.7 billion weights stands for it
(`SEVEN_B`: the shape of Llama-2-7B, arXiv 2307.09288). Money and cloud energy are `data/economics.toml`: ranges with sources, drawn from
by Monte Carlo; the interval is the middle 95 % of the draws.
"""

import tomllib
from collections.abc import Mapping
from functools import cache

import numpy as np

from edgelab.claims.bench import Bench, found, stored
from edgelab.device import Estimate, predict
from edgelab.efficiency import prefill_validation
from edgelab.ledger import NO_VALUE, Entry
from edgelab.paths import data_dir
from edgelab.shape import ModelShape, from_config
from edgelab.simulate import power_by_duty, saved_against

DRAWS = 20_000
PHONE = "xiaomi-13-pro"
SEVEN_B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
ONE_B = SEVEN_B | {  # Llama-3.2-1B's shape: what fits in float32, too
    "hidden_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
    "tie_word_embeddings": True, "head_dim": 64,
}  # fmt: skip
SMALL = SEVEN_B | {  # 110 million weights, BERT-base's size: what an old phone with 2 GB can hold in float32
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 2048,
    "vocab_size": 30522, "tie_word_embeddings": True,
}  # fmt: skip


def shape(scheme: str | float, config: Mapping = SEVEN_B, name: str = "7B") -> ModelShape:
    return from_config(config, scheme, name=f"{name}, {scheme}")


@cache
def economics() -> dict[str, dict[str, tuple[float, float, str, str, str]]]:
    """{section: {name: (low, high, unit, how, source)}} of data/economics.toml. Raises ValueError for a range of another form."""
    path = data_dir() / "economics.toml"
    with path.open("rb") as f:
        d = tomllib.load(f)
    d |= {f"board.{name}": values for name, values in d.pop("board").items()}
    for section, values in d.items():
        for name, v in values.items():
            if len(v) != 5 or not 0 < v[0] <= v[1] or not v[4]:
                raise ValueError(f"{path}: {section}.{name} is no [low, high, unit, how, source] with 0 < low <= high")
    return {section: {name: tuple(v) for name, v in values.items()} for section, values in d.items()}


def drawn(section: str, name: str, rng: np.random.Generator) -> np.ndarray:
    """float64 [DRAWS], even in the logarithm over the stated range."""
    low, high = economics()[section][name][:2]
    return low * (high / low) ** rng.random(DRAWS)


def middle(values: np.ndarray) -> tuple[float, float, float]:
    """(median, 2.5th, 97.5th percentile)."""
    low, value, high = np.percentile(values, [2.5, 50, 97.5])
    return float(value), float(low), float(high)


def _between(estimate: Estimate, rng: np.random.Generator) -> np.ndarray:
    """Draws of a log-normal, four of five of which lie in the estimate's band, as held-out measurements did; a width for each side."""
    up, down = np.log(estimate.high / estimate.value) / 1.2816, np.log(estimate.value / estimate.low) / 1.2816
    z = rng.standard_normal(DRAWS)
    return estimate.value * np.exp(np.where(z > 0, up, down) * z)


_BAND = "modelled; band of the roofline (four of five held-out measurements)"


def four_bits_on_a_phone() -> str:
    """How many times faster than float32 the roofline has int4 on the phone, for a model that fits in both."""
    whole, packed = (predict(PHONE, shape(s, ONE_B, "1B")).decode for s in (32.0, "int4-g32"))
    return f"{packed.value / whole.value:.1f} x ({whole.value:.1f} to {packed.value:.1f} tokens/s, 1.2 billion weights; modelled)"


def a8(bench: Bench) -> Entry:
    """Cold start on a Xiaomi 13 Pro: the file, read from its flash."""
    model = shape("int4-g32")
    slow, fast = economics()["phone"]["flash"][:2]
    load = predict(PHONE, model).load
    return found(
        "A8",
        f"reading {model.weight_bytes / 1e9:.2f} GB (6.7 billion weights in int4-g32) from the phone's UFS 4.0, once",
        (load.value, model.weight_bytes / fast, model.weight_bytes / slow),
        "s",
        1,
        "modelled; from sequential reads to blocks of 4 KB",
        provenance="modelled",
        beside={"read in": f"{model.weight_bytes / 12.3e9:.2f} GB/s for the claim's 12.3 s: less than the flash gives at its worst"},
    )


def a9(bench: Bench) -> Entry:
    """Steady latency of an inference, whose length the article does not say."""
    p = predict(PHONE, shape("int4-g32"), prompt=32, context=128)
    rng = np.random.default_rng(bench.seed)
    tokens = drawn("answers", "short_inference_tokens", rng)
    return found(
        "A9",
        "writing 8 to 64 tokens with 6.7 billion weights in int4-g32 on the phone's processor, tuned kernels, warm: at the rate that is "
        "left "
        "when the phone has throttled",
        middle(tokens / _between(p.steady, rng)),
        "s",
        DRAWS,
        "draws of the length and of the roofline's spread",
        provenance="modelled",
        beside={
            "decoding": f"{p.decode} cold, {p.steady} warm",
            "1.8 s are": f"{1.8 * p.steady.value:.0f} tokens, {1.8 * p.decode.value:.0f} on a cold phone",
        },
    )


def a10(bench: Bench) -> Entry:
    """Peak memory on a Xiaomi 13 Pro: weights, cache and working memory."""
    totals = [
        predict(PHONE, shape(s), context=c).memory.total / 1e9 for s, c in (("int4-g32", 1024), ("int4-row", 128), ("int4-g32", 4096))
    ]
    return found(
        "A10",
        "weights in 4 bits, keys and values of 1,024 tokens, working memory, 6.7 billion weights",
        (totals[0], totals[1], totals[2]),
        "GB",
        1,
        "modelled; from one scale per row and 128 tokens to a scale per 32 weights and 4,096",
        provenance="modelled",
        beside={"against A1": "the article's own file takes 3.2 GB: 2.8 at the peak would mean that part of it never is in memory (A7)"},
    )


def a11(bench: Bench) -> Entry:
    """Battery used in ten minutes of running without a pause."""
    p = predict(PHONE, shape("int4-g32"))
    low, high = economics()["phone"]["power"][:2]
    per_watt = p.battery.value / 6 / 4.0  # of the profile's 4 W
    return found(
        "A11",
        "ten minutes of decoding at 3 to 5 W, of a battery of 18.65 Wh",
        (p.battery.value / 6, low * per_watt, high * per_watt),
        "% per 10 min",
        1,
        "modelled; the range of power that a phone can give off",
        provenance="modelled",
        beside={"1 % in 10 minutes": "is 1.12 W for everything, the screen with it"},
    )


def _prompt_errors(engine: str) -> list[float]:
    """Measured over predicted speed of held-out prompts of a class: 2 where the model says half of what was measured."""
    return [float(row["measured"]) / float(row["predicted"]) for row in prefill_validation() if row["class"] == engine]


def a13(bench: Bench) -> Entry:
    """A neural processor against the processor: both read the same memory while decoding, and a prompt is where they differ."""
    model = shape("int4-g32")
    cpu, npu = (predict(PHONE, model, engine=e).decode for e in ("cpu-tuned", "npu"))
    plain = predict(PHONE, model, engine="cpu").decode
    board = [predict("rk3588", shape("int8-row", SMALL, "110M"), engine=e, prompt=512).prefill for e in ("npu", "cpu-tuned")]
    off = _prompt_errors("npu")
    reading = board[0].value / board[1].value
    return found(
        "A13",
        "decoding with 6.7 billion weights in int4-g32, the fitted neural processors against the fitted tuned processors, same memory",
        (npu.value / cpu.value, npu.low / cpu.high, npu.high / cpu.low),
        "x",
        1,
        _BAND,
        provenance="modelled",
        band=False,
        control=f"the model of neural processors is known to be off: of {len(off)} held-out prompts it predicts "
        f"{100 * (1 - 1 / min(off)):.0f} to {100 * (1 - 1 / max(off)):.0f} % less than was measured, so nothing is said to lie inside "
        "of its band",
        beside={
            "against untuned kernels": f"{npu.value / plain.value:.2f} x",
            "reading a prompt of 512 on an RK3588": f"{reading:.2f} x by the model, {reading * min(off):.1f} to "
            f"{reading * max(off):.1f} x if it "
            "is off by as much there",
        },
    )


def b9(bench: Bench) -> Entry:
    """One runtime against another on the same board: neither was run, and no model of ours tells two runtimes of one class apart."""
    p = predict("jetson-agx-orin", shape("int4-g32"), engine="gpu")
    return Entry(
        "B9",
        "nothing: the roofline knows what runtimes on GPUs reach, and not how two of them differ on one board",
        None,
        None,
        None,
        "% lower",
        0,
        "it takes the board, the claimant's runtime and TensorRT on it; a band made of the roofline's own error would be no band of this",
        provenance=NO_VALUE,
        beside={"decoding by any of them": f"{p.decode}, 6.7 billion weights in int4-g32 (modelled)"},
        band=False,
    )


def c4(bench: Bench) -> Entry:
    """Power of the dynamic branch, from the time that it saves (C3) and the part of the power that does not care."""
    time = stored("C3")
    rng = np.random.default_rng(bench.seed)
    low, high = economics()["phone"]["static_share"][:2]
    share = low + (high - low) * rng.random(DRAWS)
    sigma = (time.high - time.low) / (2 * 1.96)
    saved = rng.normal(time.value, sigma, DRAWS)
    less = np.array([100 * (1 - power_by_duty(1.0, 1.0, 1 - s / 100, p)) for s, p in zip(saved[:2000], share[:2000], strict=True)])
    return found(
        "C4",
        "mean power at the same rate of answers, from the time per token that the early exit saves (C3, measured at build) and a share of "
        "the power, 5 to 60 %, that does not depend on it",
        middle(less),
        "% less power",
        len(less),
        "draws",
        provenance="modelled",
        beside={
            "from the article's own 89 to 62 ms": f"{power_by_duty(210, 89, 62):.0f} mW of 210 if nothing were static; it says 145: "
            "its power is its latency, scaled"
        },
    )


def c6(bench: Bench) -> Entry:
    """A phone with four Cortex-A53 and 2 GB: half of the channels cut and INT8, against FP32."""
    whole, cut = shape(32.0, SMALL, "110M"), shape("int8-row", SMALL | {"intermediate_size": SMALL["intermediate_size"] // 2}, "110M cut")
    a, b = (predict("redmi-6a", s, engine="cpu", prompt=128, context=128) for s in (whole, cut))
    decode, prompt = b.decode.value / a.decode.value, a.first_token.value / b.first_token.value
    read = whole.decode_bytes(128) / cut.decode_bytes(128)
    return found(
        "C6",
        "a model of BERT-base's size on a Redmi 6A: writing a token in int8 with half of the feed-forward channels, against float32",
        (decode, min(prompt, decode), max(read, decode)),
        "x",
        1,
        "modelled; from operations alone (a prompt, int8 no faster than float32) to bytes alone",
        provenance="modelled",
        beside={"a token": f"{1e3 / a.decode.value:.0f} to {1e3 / b.decode.value:.0f} ms"}
        | {"a prompt of 128": f"{1e3 * a.first_token.value:.0f} to {1e3 * b.first_token.value:.0f} ms"},
    )


def d3(bench: Bench) -> Entry:
    """Energy of an answer on the phone against one of a cloud model."""
    rng = np.random.default_rng(bench.seed)
    p = predict(PHONE, shape("int4-g32"), prompt=256)
    answer, prompt = drawn("answers", "answer_tokens", rng), drawn("answers", "prompt_tokens", rng)
    watts = drawn("phone", "power", rng)
    local = watts * (answer / _between(p.decode, rng) + prompt / p.prefill.value)
    cloud, radio = 3600 * drawn("cloud", "energy", rng), drawn("phone", "network", rng)
    saved = np.array([saved_against(c, j, r) for c, j, r in zip(cloud, local, radio, strict=True)])
    return found(
        "D3",
        "an answer of 64 to 512 tokens by 6.7 billion weights in int4-g32 on the phone, against 0.047 to 0.34 Wh in the cloud and radio",
        middle(saved),
        "% less energy",
        DRAWS,
        "draws of data/economics.toml and of the roofline's spread",
        provenance="modelled",
        beside={
            "on the phone": f"{np.median(local) / 3600:.3f} Wh, in the cloud {np.median(cloud) / 3600:.3f} Wh (medians)",
            "saves at all": f"in {100 * (saved > 0).mean():.0f} % of the draws; 72 % and more in {100 * (saved >= 72).mean():.0f} %",
            "not the same answer": "the cloud's models are far larger",
        },
    )


def d9(bench: Bench) -> Entry:
    """The first token of a model in FP16, which does not fit: its weights come from flash."""
    model = shape(16.0)
    slow, fast = economics()["phone"]["flash"][:2]
    p = predict(PHONE, model)
    packed = predict(PHONE, shape("int4-g32")).first_token
    return found(
        "D9",
        f"{model.weight_bytes / 1e9:.1f} GB in float16 on a phone whose apps may take {p.memory.usable / 1e9:.0f} GB: every weight is read "
        "from flash before the first token is there",
        (p.load.value, model.weight_bytes / fast, model.weight_bytes / slow),
        "s",
        1,
        "modelled; from sequential reads to blocks of 4 KB",
        provenance="modelled",
        beside={"in int4-g32, a prompt of 128": f"{packed} of arithmetic on the processor, which float16 needs on top"},
    )


def _boards() -> list[tuple[str, dict]]:
    return [(name.removeprefix("board."), v) for name, v in economics().items() if name.startswith("board.")]


def b12(bench: Bench) -> Entry:
    """Boards on the spot against an API: cost per year. As many boards as the busiest hour needs, each with its own price and power."""
    rng = np.random.default_rng(bench.seed)
    boards = _boards()
    which = rng.integers(0, len(boards), DRAWS)
    predicted = [predict(name, shape("int4-g32"), engine="gpu", prompt=256) for name, _ in boards]

    def of(name: str) -> np.ndarray:
        """Draws of a property of the board that was drawn."""
        return np.choose(which, [drawn(f"board.{board}", name, rng) for board, _ in boards])

    def speed(name: str) -> np.ndarray:
        return np.choose(which, [_between(getattr(p, name), rng) for p in predicted])

    life, upkeep = drawn("boards", "life", rng), drawn("boards", "upkeep", rng)
    requests, busiest = drawn("boards", "requests", rng), drawn("boards", "busiest_hour", rng)
    read, written = drawn("answers", "prompt_tokens", rng), drawn("answers", "answer_tokens", rng)
    seconds = read / speed("prefill") + written / speed("steady")
    needed = boards_for(requests * busiest, seconds)
    one = of("price") / life + of("power") * 8.766 * drawn("boards", "electricity", rng)
    edge = needed * one + upkeep
    each = (read * drawn("cloud", "price_in", rng) + written * drawn("cloud", "price_out", rng)) / 1e6
    lower = 100 * (1 - edge / (365.25 * requests * each))
    return found(
        "B12",
        "a year of Jetson boards (as many as the busiest hour needs; price over life and power of each, upkeep) running 6.7 billion "
        "weights in "
        "int4-g32, against the same requests at an API's price per token",
        middle(lower),
        "% lower",
        DRAWS,
        "draws of data/economics.toml and of the roofline's spread",
        provenance="modelled",
        beside={
            "cheaper at all": f"in {100 * (lower > 0).mean():.0f} % of the draws; by 68 % and more in {100 * (lower >= 68).mean():.0f} %",
            "boards": "{:,.0f} [{:,.0f}, {:,.0f}], a request taking {:.0f} s [{:.0f}, {:.0f}]".format(*middle(needed), *middle(seconds)),
            "not the same answer": "the API's models are a hundred times larger",
        },
    )


def boards_for(requests_per_hour, seconds_each):
    """Boards that are needed: the load in whole hours of work, rounded up, for half a board is not sold.

    >>> boards_for(np.array([10, 100, 360, 361]), 10.0)
    array([1., 1., 1., 2.])
    """
    return np.maximum(1.0, np.ceil(np.asarray(requests_per_hour) * seconds_each / 3600))
