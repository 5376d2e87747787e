"""What notebook 09 shows follows from the predictor, the simulator and what is measured here; its checks reject plausible mistakes."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")

from edgelab import device_lab as lab
from edgelab import plots
from edgelab.device import device, discrepancies, predict
from edgelab.efficiency import fitted, published, validation
from edgelab.expert_cache import Trace as ExpertTrace
from edgelab.governor import PHONE, Setting
from edgelab.host import Host
from edgelab.paths import data_dir
from edgelab.probes import Probe
from edgelab.shape import from_config, from_folder
from edgelab.simulate import Device, Workload, compare

LLAMA = lab.models()["llama-3.2-1b"]


# ------------------------------------------------------------------------------------------------------ models and recipes


@pytest.mark.parametrize("name", list(lab.models()))
def test_every_model_has_a_shape_under_each_of_its_recipes(name):
    source = lab.models()[name]
    offered = lab.recipes_for(source)
    shapes = {r: lab.shape_with(name, source, r) for r in offered}
    by_bits = [shapes[r].weight_bytes for r in ("16 bits", "int8-g32", "int4-g32", "int3-g64", "int2-g64")]
    assert by_bits == sorted(by_bits, reverse=True) and len(set(by_bits)) == 5
    assert {s.name for s in shapes.values()} == {name}


def test_sizes_are_those_of_the_cards():
    """Parameters as the model cards state them: Llama-3.2-1B 1.24e9, Moonlight 16e9 of which 3e9 are used."""
    assert lab.shape_with("x", LLAMA, "16 bits").parameters == pytest.approx(1.24e9, rel=0.005)
    moonlight = lab.shape_with("x", lab.MOONLIGHT, "16 bits")
    assert moonlight.parameters == pytest.approx(16e9, rel=0.01) and moonlight.active_weights == pytest.approx(2.6e9, rel=0.1)


def test_recipes_do_what_their_names_say():
    full, half = (lab.shape_with("m", lab.MOONLIGHT, r) for r in ("int4-g32", "half of the experts, int4-g32"))
    assert (full.experts, half.experts) == (64, 32) and half.top_k == full.top_k and half.expert_bytes == full.expert_bytes
    stored = lab.shape_with("edge-phone", data_dir() / "edge-phone", "as stored")
    assert stored.weight_bytes == from_folder(data_dir() / "edge-phone").weight_bytes
    assert "as stored" not in lab.recipes_for(LLAMA) and not any("experts" in r for r in lab.recipes_for(LLAMA))
    with pytest.raises(ValueError, match="recipe='as stored' is not one for llama; use one of 16 bits"):
        lab.shape_with("llama", LLAMA, "as stored")


# ----------------------------------------------------------------------------------------------------------- this machine


def flat_host(read: float, overhead_s: float) -> Host:
    """A machine that reads `read` bytes per second from everywhere, and whose runtime takes `overhead_s` per token and no more."""
    from edgelab.host import TERMS
    from edgelab.report import machine

    sizes = ((1 << 20, read), (1 << 28, read))
    return Host(device("raspberry-pi-5"), machine(), {1: sizes}, {1: 1e12}, runtime={1: (overhead_s, *[0.0] * (len(TERMS) - 1))})


def test_a_model_here_is_predicted_then_measured():
    small = Probe(
        "small",
        {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 128, "max_position_embeddings": 256, "tie_word_embeddings": False,
        },
    )  # fmt: skip
    o = lab.own(flat_host(1e9, 1.0), small, seconds=0.01)
    kv = 2 * 2 * 32 * 2 * 48  # layers, keys and values, numbers, float16, tokens
    norms = 2 * (5 * 64)
    codes = from_config(small.config, "int4-g32").dense_bytes
    assert o.bytes_per_token == pytest.approx(codes + kv, abs=norms) and o.roof_s == pytest.approx(o.bytes_per_token / 1e9)
    assert o.modelled_s == 1.0 and o.most == "step" and 0 < o.measured_s < 0.1
    assert o.error == pytest.approx(o.measured_s - 1) and o.roof_error == pytest.approx(o.measured_s / o.roof_s - 1)
    (line,) = lab.own_rows([o])
    assert line["with overheads, tokens/s (modelled)"] == "1" and line["most of the time (modelled)"] == "step"
    assert line["off by "] == f"{o.error:+.0%}" and line["off by"] == f"{o.roof_error:+.0%}"


def test_plans_stand_side_by_side():
    from edgelab.memory_plan import MemoryPlan

    plans = {"one": MemoryPlan(3, 4000, 1000, 900, 10, 40, 500, 0), "two": MemoryPlan(3, 4000, 1000, 900, 20, 80, 500, 0)}
    lines = {line["memory"]: line for line in lab.plan_rows(plans)}
    assert lines["cache of keys and values"] == {"memory": "cache of keys and values", "one": "10", "two": "20"}
    assert lines["activations, planned"]["two"] == "1,000"


# ------------------------------------------------------------------------------------------------------------ the roofline


def test_points_lie_under_the_roof_that_is_reached_and_match_the_predictor():
    one = lab.shape_with("llama-3.2-1b", LLAMA, "int4-g32")
    r = lab.roofs("oneplus-12", one, prompts=(8, 512))
    profile, eff = device("oneplus-12"), fitted()["cpu-tuned"]
    for p in r.points:
        roof = min(eff.eta * profile.dram_bytes_per_s.value * p.intensity, eff.gamma * profile.cpu_int8_ops_per_s.value)
        assert 0.3 * roof < p.ops_per_s <= roof * (1 + 1e-9), p.what
    assert r.points[0].ops_per_s / one.decode_ops(1024) == pytest.approx(predict("oneplus-12", one).decode.value)
    assert r.points[0].intensity < r.knee < r.points[-1].intensity
    said = lab.say_roofline(r)
    assert said.startswith("Modelled") and "prompt of 512" in said.rsplit("on:", 1)[1] and "decoding" not in said.rsplit("on:", 1)[1]
    assert [row["work"] for row in lab.roofline_rows(r)] == ["decoding", "prompt of 8", "prompt of 512"]
    svg = ET.fromstring(plots.to_svg(lab.roofline_figure(r), describe=said))
    assert svg.tag.endswith("svg")


@pytest.mark.parametrize(
    ("name", "engine", "says"),
    [
        ("galaxy-s24", "npu", "npu_int8_ops_per_s"),
        ("redmi-6a", "cpu-tuned", "needs .* and an app may take"),
        ("oneplus-12", "gpu", "has no gpu_fp16"),
    ],
)  # fmt: skip
def test_no_roof_without_its_numbers(name, engine, says):
    with pytest.raises(ValueError, match=says):
        lab.roofs(name, lab.shape_with("llama-3.2-3b", lab.models()["llama-3.2-3b"], "int4-g32"), engine=engine)
    with pytest.raises(ValueError, match="more than 512 tokens"):
        lab.roofs("oneplus-12", lab.shape_with("x", LLAMA, "int4-g32"), prompts=(513,))


# ------------------------------------------------------------------------------------------------------------ predictions


def test_lines_say_what_is_assumed_and_what_is_missing():
    one, eight = (lab.shape_with(n, lab.models()[n], "int4-g32") for n in ("llama-3.2-1b", "llama-3-8b"))
    phone, small, board = lab.prediction_rows([predict("oneplus-12", one), predict("redmi-6a", eight), predict("jetson-orin-nano", one)])
    p = predict("oneplus-12", one)
    assert phone["tokens/s [4 of 5 held-out]"] == f"{p.decode.value:.3g} [{p.decode.low:.3g}, {p.decode.high:.3g}]"
    assert phone["J per token"].endswith("*") and not board["J per token"].endswith("*") and board["load, s"] == ""
    assert (
        small["tokens/s [4 of 5 held-out]"] == "does not fit" and small["memory"].endswith(": does not fit") and small["J per token"] == ""
    )


def test_peaks_promise_what_arithmetic_alone_would_give():
    found = lab.by_peak()
    held = [r for r in published() if r.split == "held-out"]
    assert 20 < len(found) <= len(held)
    b = next(b for b in found if (b.device, b.engine) == ("rk3588", "npu"))
    row = next(r for r in held if (r.device.name, r.model, r.decode) == (b.device, b.model, b.measured))
    assert b.by_peak == pytest.approx(row.device.npu_int8_ops_per_s.value / row.shape.decode_ops(row.context))
    assert lab.factor(found, "by_peak") > 5 > 2 > lab.factor(found, "by_bandwidth") >= 1
    two = [lab.ByPeak("d", "m", "cpu", 10.0, 40.0, 5.0), lab.ByPeak("d", "n", "cpu", 10.0, 2.5, 10.0)]
    assert lab.factor(two, "by_peak") == pytest.approx(4.0) and lab.factor(two, "by_bandwidth") == pytest.approx(1.5)
    rows = lab.peak_rows(found, most=3)
    times = [float(r["times too fast"].replace(",", "")) for r in rows]
    assert len(rows) == 3 and times == sorted(times, reverse=True)


def test_validation_is_told_by_device_and_discrepancies_keep_both_numbers():
    v = validation()
    lines = lab.validation_rows(v)
    assert sum(int(line["rows"]) for line in lines) == len(v.checked)
    medians = [float(line["median error"].rstrip("%")) for line in lines]
    assert medians == sorted(medians, reverse=True)
    nano = [r for r in lab.discrepancy_rows(discrepancies()) if r["device"] == "jetson-nano"]
    assert {r["article"] for r in nano} == {"4.7 Top/s", "8 GB"} and all(r["source"] for r in nano)


# -------------------------------------------------------------------------------------------------------- experts on flash


def test_hit_rates_are_the_cache_s_own_and_flash_is_added():
    moonlight = lab.shape_with("moonlight", lab.MOONLIGHT, "int4-g32")
    choices = np.tile(np.array([[0, 1], [2, 3], [0, 1], [2, 3]], np.int16), (2, 50, 1))  # four of eight experts, in turn
    trace = ExpertTrace(choices, 8, (1.0, 1.0), ("a", "b"))
    chance, lru, all_of_them = lab.flash_rows("xiaomi-13-pro", moonlight, trace)
    m = predict("xiaomi-13-pro", moonlight).memory
    assert chance["hit rate"] == f"{m.kept / 64:.0%}" and chance["waits for"] == "flash"
    capacity = round(8 * m.kept / 64)
    assert capacity == 5 and "5 of 8" in lru["hits"] and lru["hit rate"] == "99%"  # after the first use of each all four stay: 396 of 400
    assert all_of_them["read from flash per token (modelled)"] == "0" and all_of_them["waits for"] == "bandwidth"
    speeds = [float(r["tokens/s (modelled)"].split(" ")[0]) for r in (chance, lru, all_of_them)]
    assert speeds == sorted(speeds) and len(set(speeds)) == 3
    with pytest.raises(ValueError, match="no experts are left on flash"):
        lab.flash_rows("apple-m2-ultra", lab.shape_with("half", lab.MOONLIGHT, "half of the experts, int4-g32"), trace)
    with pytest.raises(ValueError, match="has no experts"):
        lab.flash_rows("oneplus-12", lab.shape_with("llama", LLAMA, "int4-g32"), trace)


# ---------------------------------------------------------------------------------------------------------------- governor


def test_without_hysteresis_the_mode_flaps_and_with_it_it_begins_once():
    for seed in range(3):
        as_it_is, bare, no_dwell, neither = (int(list(r.values())[1]) for r in lab.flapping_rows(seed=seed))
        assert as_it_is == no_dwell == 1 and neither > bare > 10
    assert lab.switches(PHONE, noise=0.0) == 1
    with_mode = lab.low_policy(0.5, Setting("int2", threads=1))
    assert [t.at for t in with_mode.thresholds if t.reading == "battery"] == [0.5] and with_mode.levels["low-power"].precision == "int2"
    assert [t for t in with_mode.thresholds if t.reading != "battery"] == [t for t in PHONE.thresholds if t.reading != "battery"]


@pytest.fixture(scope="module")
def governor():
    return lab.GovernorControl()


def test_the_governor_s_control_shows_the_simulator_s_numbers(governor):
    gain = governor.choose(static_w=0.5, per_minute=6.0, at=30)
    policy = lab.low_policy(0.3, lab.LOW_SETTINGS[governor.low.value])
    direct, *_ = compare(policy.without("battery"), policy, Device(static_w=0.5), Workload(64, 6.0), battery=0.3, hours=100, step_s=5.0)
    assert gain.hours == pytest.approx(direct.hours, rel=0.02) and gain.latency == pytest.approx(direct.latency, abs=1)
    assert f"{round(gain.hours):+d} %" in governor.sentence.value and "Modelled" in governor.sentence.value
    assert f"{100 * governor.trace.battery[0]:.0f}" == "100" and governor.trace.empty
    start = next(start for start, _, level in governor.trace.bands() if "low-power" in level)
    at = governor.trace.battery[np.searchsorted(governor.trace.time_s, start)]
    assert at == pytest.approx(0.3, abs=0.01)
    assert ET.fromstring(governor.picture.value).tag.endswith("svg") and "low-power" in governor.table.value


def test_static_power_decides_what_the_mode_gains(governor):
    hours = [governor.choose(static_w=p, per_minute=4.0, at=20).hours for p in (0.0, 0.3, 1.0, 4.0)]
    assert hours == sorted(hours, reverse=True) and hours[0] > 100 > 25 > hours[-1] > 0
    assert "and at least +40 % at once: no" in governor.told
    governor.choose(static_w=0.3)
    assert "and at least +40 % at once: yes" in governor.told and "-0 %" not in governor.told
    assert governor.choose(static_w=0.0, per_minute=0.2).hours > 0 and governor.trace.empty


def test_sliders_and_boxes_follow_each_other(governor):
    for box, slider in zip((governor.static_w, governor.per_minute, governor.at), governor.sliders, strict=True):
        slider.value = 7 if box is governor.at else 1.7
        assert box.value == slider.value and f"{box.value}"
        box.value = box.min
        assert slider.value == box.min and box.description
    governor.static_w.value = 99
    assert governor.static_w.value == 4.0 == governor.sliders[0].value
    for wrong, says in (({"static_w": 5.0}, "outside 0.0 .. 4.0"), ({"low": "fast"}, "is not offered; there are int4")):
        with pytest.raises(ValueError, match=says):
            governor.choose(**wrong)
    assert governor.static_w.value == 4.0


# ------------------------------------------------------------------------------------------------------------- the control


@pytest.fixture(scope="module")
def control():
    return lab.DeviceControl()


def test_the_control_shows_the_predictor_s_numbers(control):
    shown = control.choose("galaxy-s22", "llama-3-8b", "int3-g64", context=512, prompt=64)
    direct = predict("galaxy-s22", lab.shape_with("llama-3-8b", lab.models()["llama-3-8b"], "int3-g64"), context=512, prompt=64)
    assert shown == direct and str(direct.decode) in control.sentence.value and "Modelled" in control.told
    assert str(direct.decode) in control.table.value and "assumed" in control.told
    by_name = {t.name: t for t in control.figure.data}
    phones = dict(zip(by_name["phones"].x, by_name["phones"].y, strict=True))
    assert phones[51.2] == pytest.approx(direct.decode.value) or direct.decode.value in by_name["phones"].y
    assert by_name["the chosen one"].y == (direct.decode.value,)
    drawn = sum(len(t.x) for t in control.figure.data if t.type == "scatter" and t.mode == "markers" and t.name != "the chosen one")
    assert drawn == sum(p.decode is not None for p in control.predictions.values())
    i = by_name["phones"].y.index(direct.decode.value)
    assert by_name["phones"].error_y.array[i] == pytest.approx(direct.decode.high - direct.decode.value)
    parts = {r: sum(t.y[i] for t in control.figure.data[-4:]) for i, r in enumerate(by_name["bandwidth"].x)}
    assert parts["int3-g64"] == pytest.approx(1e3 / direct.decode.value) and list(parts) == list(control.recipe.options)
    assert parts["int8-g32"] == 0.0 and control.by_recipe["int8-g32"].fits is False  # what does not fit takes no time
    roof = by_name["bytes / bandwidth"]
    assert roof.y[0] / roof.x[0] == pytest.approx(1e9 / control.shape.decode_bytes(512))


def test_what_does_not_fit_is_said_and_not_drawn(control):
    p = control.choose("iphone-15-pro", "llama-3-8b", "16 bits")
    assert p.decode is None and control.error is None and "no speed, it needs 16" in control.told
    assert "does not fit on" in control.told and list({t.name: t for t in control.figure.data}["the chosen one"].x) == []
    speeds, times = control.static()
    assert {t.name for t in speeds.data} >= {"bytes / bandwidth", "laptops"} and {t.name for t in times.data} == {"bandwidth", "overhead"}


def test_recipes_follow_the_model_and_wrong_choices_change_nothing(control):
    control.choose("oneplus-12", "llama-3.2-1b", "int4-g32", context=1024, engine="cpu-tuned")
    control.model.value = "edge-phone"
    assert control.recipe.options[0] == "as stored" and control.recipe.value == "int4-g32" and control.error is None
    control.recipe.value = "as stored"
    assert "as stored" in control.told
    control.model.value = "llama-3.2-1b"
    assert control.recipe.value == "16 bits" and "llama-3.2-1b, 16 bits" in control.told
    for wrong, says in (
        ({"device": "nokia-3310"}, "is not offered; there are Xiaomi"),
        ({"recipe": "as stored"}, "recipe='as stored' is not offered; there are 16 bits"),
        ({"model": "edge-moe", "device": "nokia-3310"}, "is not offered"),
        ({"model": "llama-3-8b", "recipe": "as stored"}, "not offered for llama-3-8b"),
        ({"context": 0}, "context=0 is outside 1 .. 131072"),
        ({"engine": "tpu"}, "software='tpu' is not offered; there are cpu"),
    ):
        with pytest.raises(ValueError, match=says):
            control.choose(**wrong)
        assert (control.model.value, control.recipe.value, control.device.value) == ("llama-3.2-1b", "16 bits", "oneplus-12")


def test_the_context_has_a_box_and_a_slider_in_powers_of_two(control):
    control.slider.value = 12
    assert control.context.value == 4096 and "context 4,096" in control.told
    control.context.value = 3000  # any number by hand: the slider goes near, and the box stays
    assert control.slider.value == 12 and control.context.value == 3000 and "context 3,000" in control.told


def test_an_error_is_shown_in_place_and_goes_away(control, monkeypatch):
    control.choose("oneplus-12", "llama-3.2-1b", "int4-g32")
    with monkeypatch.context() as broken:
        broken.setattr(lab, "everywhere", lambda *_, **__: (_ for _ in ()).throw(OSError("<gone>")))
        assert control.choose(context=99) is None
        assert isinstance(control.error, OSError) and 'role="alert"' in control.sentence.value and "&lt;gone&gt;" in control.sentence.value
    assert control.choose(context=100) is not None and control.error is None and "alert" not in control.sentence.value


def test_controls_have_names_and_static_faces(control, governor):
    control.choose("oneplus-12", "llama-3.2-1b", "int4-g32")
    for c in (control, governor):
        bundle = c._repr_mimebundle_()
        assert "Modelled" in bundle["text/plain"] and "application/vnd.jupyter.widget-view+json" in bundle
    inputs = (control.device, control.model, control.recipe, control.engine, control.context, control.prompt, governor.low)
    assert all(i.description for i in inputs)
    for figure in (*control.static(), governor.figure()):
        assert "(modelled)" in figure.layout.title.text and len(figure.data) > 0
        assert ET.fromstring(plots.to_svg(figure)).tag.endswith("svg")
    with pytest.raises(ValueError, match="device='nokia-3310' is not known; use one of xiaomi"):
        lab.DeviceControl("nokia-3310")
    with pytest.raises(ValueError, match="model='gpt' is not offered; there are llama"):
        lab.DeviceControl(model="gpt")
    with pytest.raises(ValueError, match="recipe='int5' is not one for llama"):
        lab.DeviceControl(recipe="int5")


# ----------------------------------------------------------------------------------------------------------- the exercises


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            lab.check_cache,
            134.2,
            {67.1: "keys and values", 536.9: "8 heads", 268.4: "two bytes", 8.39: "every layer", 1.0: "2 · layers", "x": "one number"},
        ),
        (lab.check_static, 1.5, {0: "100 %", 1: "50 %", 2.5: "1 W saved", 3: "25 %", math.nan: "one number"}),
        (
            lab.check_flash,
            40,
            {66.7: "10 ms are still there", 100: "a fifth", 14.3: "only what is missed", 11.8: "20 %", -1: "add the time"},
        ),
    ],
)  # fmt: skip
def test_exercises(check, right, wrong):
    assert "no answer so far" in check(None) and not check(None).passed
    assert check(right).passed
    for answer, says in wrong.items():
        assert not check(answer).passed and says in check(answer), (answer, check(answer))


def test_the_right_answers_are_those_of_the_modules():
    """The exercises' numbers, computed by the code that the notebook teaches."""
    llama = from_config(LLAMA, 16.0)
    assert lab.check_cache(llama.kv_bytes(4096) / 1e6).startswith("Right")
    assert lab.check_static((2 - 1.4 * 1) / 0.4).startswith("Right")
    assert lab.check_flash(1 / (0.010 + 0.2 * 300e6 / 4e9)).startswith("Right")
    assert lab.decode_speed(1_500_000_000, 4.5, 0.0, 68e9, 0.6, 1e18) == pytest.approx(0.6 * 68e9 / (1.5e9 * 4.5 / 8))
    assert lab.decode_speed(1_500_000_000, 4.5, 0.0, 68e9, 0.6, 5e10) == pytest.approx(5e10 / 3e9), "arithmetic binds"
    assert lab.check_roofline(lab.decode_speed).passed
