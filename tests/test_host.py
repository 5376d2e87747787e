"""Measuring this machine and predicting our runtime: sums by hand, readers of files, and one real calibration."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgelab import host as hosts
from edgelab import meters, probes
from edgelab.cli_predict import app
from edgelab.device import DeviceProfile, Quantity
from edgelab.host import TERMS, Host, Work, fit_terms, kind_of, predict_host, probe_work, work_in
from edgelab.paths import data_dir
from edgelab.probes import PROBES, Probe, probe_model
from edgelab.report import machine

MIB = 1 << 20
CURVE = ((1 * MIB, 80e9), (8 * MIB, 100e9), (64 * MIB, 40e9), (256 * MIB, 20e9))


def made_up(**changes) -> Host:
    profile = DeviceProfile("host", "a test", "host", "none", 2024, dram_bytes_per_s=Quantity(20e9, "B/s", "a test", "measured"))
    plain = Host(profile, machine(), {1: CURVE, 2: CURVE}, {1: 1e12, 2: 2e12}, {"cpu_w": "no RAPL"})
    return replace(plain, **changes)


def work(**changes) -> Work:
    plain = Work(
        attention=2, latent=0, mlps=1, mixtures=1, weights={"4 bits": 1e6}, packed_bytes=0.5e6, float_bytes=1e5, attention_ops=1e3, heads=8,
        kv_bytes=100, vocabulary=500,
    )  # fmt: skip
    return replace(plain, **changes)


# -------------------------------------------------------------------------------------------------------------- meters


def test_power_is_read_from_a_counter_that_may_begin_again(tmp_path):
    watts, why = meters.power_reader(tmp_path / "absent")
    assert watts is None and "does not exist" in why
    rapl = tmp_path / "intel-rapl:0"
    rapl.mkdir()
    (rapl / "energy_uj").write_text("900000")
    (rapl / "max_energy_range_uj").write_text("1000000")
    watts, why = meters.power_reader(rapl)
    seen = []

    def spend() -> None:  # 0.5 J: over the counter's end
        (rapl / "energy_uj").write_text("400000")
        started = os.times().elapsed
        while os.times().elapsed - started < 0.05:
            pass
        seen.append(os.times().elapsed - started)

    assert "RAPL" in why and watts(spend) == pytest.approx(0.5 / seen[0], rel=0.5)
    (rapl / "energy_uj").write_text("not a number")
    assert meters.power_reader(rapl)[0] is None


def test_a_battery_is_read_where_there_is_one(tmp_path):
    wh, why = meters.battery_wh(tmp_path)
    assert wh is None and why
    (tmp_path / "BAT0").mkdir()
    (tmp_path / "BAT0" / "energy_full").write_text("50000000")
    assert meters.battery_wh(tmp_path)[0] == 50
    (tmp_path / "BAT0" / "energy_full").unlink()
    (tmp_path / "BAT0" / "charge_full").write_text("4000000")
    (tmp_path / "BAT0" / "voltage_min_design").write_text("3850000")
    assert meters.battery_wh(tmp_path)[0] == pytest.approx(15.4)


def test_a_disk_that_is_the_cache_is_not_called_a_disk(tmp_path, monkeypatch):
    rates = iter([9e9, 10e9, 1e9, 10e9])
    monkeypatch.setattr(meters, "_read_file", lambda name: next(rates))
    rate, why = meters.disk_bandwidth(tmp_path, size=MIB)
    assert rate is None and "came from the system's cache" in why
    rate, why = meters.disk_bandwidth(tmp_path, size=MIB)
    assert rate == 1e9 and "10 GB/s" in why
    assert list(tmp_path.iterdir()) == []
    assert meters.disk_bandwidth(tmp_path / "absent", size=MIB)[0] is None


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "x").write_bytes(bytes(9 * MIB + 5))
    assert meters._read_file(str(tmp_path / "x")) > 0


# ---------------------------------------------------------------------------------------------------------------- host


def test_bandwidth_is_taken_at_the_working_set():
    h = made_up()
    assert h.bandwidth_at(8 * MIB, 1) == 100e9 and h.bandwidth_at(1, 1) == 80e9 and h.bandwidth_at(1 << 40, 1) == 20e9
    assert h.bandwidth_at(np.sqrt(8 * 64) * MIB, 1) == pytest.approx(70e9)  # half-way by logarithms
    assert h.beyond_cache(2 * MIB, 1) == 0 and h.beyond_cache(64 * MIB, 1) == pytest.approx(0.75) and h.beyond_cache(1 << 30, 1) == 1
    flat = made_up(bandwidth={1: ((MIB, 20e9), (256 * MIB, 20e9))})
    assert flat.beyond_cache(1 << 30, 1) == 0
    with pytest.raises(ValueError, match="threads=3 was not measured"):
        h.bandwidth_at(MIB, 3)


def test_the_terms_counted_by_hand():
    h = made_up()
    c = dict(zip(TERMS, h.columns(work(), 10, 1), strict=True))
    read = h.bandwidth_at(0.5e6 + 1e5 + 1000, 1)
    assert (c["step"], c["attention"], c["latent attention"], c["MLP"], c["mixture"]) == (1, 2, 0, 1, 1)
    assert c["4 bits"] == pytest.approx(2e6 / 1e12) and c["2 bits"] == c["tables"] == 0
    assert c["floats"] == pytest.approx(1e5 / read) and c["memory"] == 0
    assert c["context"] == pytest.approx(1e3 * 10 / 1e12) and c["softmax"] == 80 and c["vocabulary"] == 500
    big = dict(zip(TERMS, h.columns(work(packed_bytes=300e6), 10, 1), strict=True))
    assert big["4 bits"] == 0 and big["memory"] == pytest.approx((300e6 + 1e5) / 20e9)
    predicted = predict_host(work(), context=10, host=made_up(runtime={1: tuple(range(1, len(TERMS) + 1))}), name="x")
    assert predicted.seconds == pytest.approx(sum((i + 1) * v for i, v in enumerate(c.values())))
    assert predicted.tokens_per_s == 1 / predicted.seconds and predicted.provenance == "modelled" and predicted.error is None
    measured = replace(predicted, measured_s=predicted.seconds * 1.1)
    assert measured.error == pytest.approx(0.1)  # ten per cent more tokens per second predicted than there were
    assert [r.provenance for r in measured.report()] == ["modelled", "measured here"]


coefficients = st.lists(st.floats(0, 1e-3), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(coefficients, coefficients, st.integers(0, 1000))
def test_no_other_coefficients_fit_better(truth, other, seed):
    scale = np.array([1, 10, 1e6])
    draw = np.random.default_rng(seed)
    columns = draw.uniform(0.5, 2, (12, 3)) * scale
    seconds = (columns @ (truth / scale) + 1e-6) * draw.uniform(0.9, 1.1, 12)
    found = fit_terms(columns, seconds)

    def loss(c: np.ndarray) -> float:
        return float(((columns @ c / seconds - 1) ** 2).sum())

    assert (found >= 0).all() and all(loss(found) <= loss(np.array(c) / scale) + 1e-9 for c in (truth, other))


def test_a_calibration_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    h = made_up(runtime={1: tuple(float(i) for i in range(len(TERMS)))}, fit_error={1: 0.03})
    path = h.save(tmp_path / "deep" / "host.json")
    assert hosts.saved_host(path) == h and Host.from_json(h.to_json()) == h
    assert [p.name for p in path.parent.iterdir()] == ["host.json"]
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        made_up().save(path)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["host.json"]


def test_a_calibration_of_another_machine_is_refused(tmp_path):
    path = made_up(machine="a Cray-1").save(tmp_path / "host.json")
    with pytest.raises(ValueError, match="is of another machine"):
        hosts.saved_host(path)
    with pytest.raises(FileNotFoundError, match="edgelab calibrate-host"):
        hosts.saved_host(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="calibration format 7 is not 1"):
        Host.from_json('{"format": 7}')
    with pytest.raises(ValueError, match="is not whole"):
        Host.from_json('{"format": 1}')
    with pytest.raises(ValueError, match="was not calibrated for threads=2"):
        predict_host(work(), threads=2, host=made_up(runtime={1: (0.0,) * len(TERMS)}))


# ---------------------------------------------------------------------------------------------------------------- work


def test_the_work_of_the_embedded_models():
    phone, dense = work_in(data_dir() / "edge-phone"), work_in(data_dir() / "edge-dense")
    assert (phone.attention, phone.latent, phone.mlps, phone.mixtures, phone.heads) == (0, 4, 1 + 3, 3, 16)  # three shared experts
    assert set(phone.weights) == {"2 bits", "3 bits", "4 bits"}
    router, keys = 3 * 8 * 256, 4 * 4 * 48 * 128
    assert phone.float_bytes == 4 * (router + keys) and sum(phone.weights.values()) > 2e6
    assert dense.weights == {} and dense.packed_bytes == 0 and dense.float_bytes == pytest.approx(4 * 3.28e6, rel=0.01)
    assert (dense.attention, dense.latent, dense.mlps, dense.mixtures) == (4, 0, 4, 0)


@pytest.mark.parametrize("probe", [p for p in PROBES if p.name in ("latent, 8 layers", "mixture, 2 layers", "dense, tables")])
def test_the_work_of_a_probe_is_that_of_its_model(probe):
    from edgelab.layers import QEmbedding, Quantized

    model, said = probe_model(probe), probe_work(probe)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, Quantized) and not isinstance(m, QEmbedding)}
    weights = nbytes = 0.0
    for name, module in quantized.items():
        active = 2 / 8 if name.endswith("experts") else 1.0
        for q in module.qtensors().values():
            weights, nbytes = weights + active * np.prod(q.shape), nbytes + active * q.nbytes
    latent = probe.config["model_type"] == "deepseek_v3"
    keys = probe.config["num_hidden_layers"] * 4 * 32 * probe.config["kv_lora_rank"] if latent else 0
    assert sum(said.weights.values()) == pytest.approx(weights - keys, rel=0.01)
    assert said.packed_bytes == pytest.approx(nbytes * (1 - keys / weights), rel=0.02)
    assert set(said.weights) == {kind_of(probe.scheme)}


def test_no_probe_is_a_model_that_is_predicted():
    embedded = [json.loads((data_dir() / n / "config.json").read_text()) for n in ("edge-moe", "edge-dense", "edge-phone")]
    for probe in PROBES:
        for config in embedded:
            assert any(probe.config.get(k) != config.get(k) for k in ("hidden_size", "num_hidden_layers", "vocab_size")), probe.name


# ------------------------------------------------------------------------------------------------------- on this machine


def calibrated() -> Host:
    """This machine, one thread, with probes that are quick to make."""
    found = hosts.measure_host(threads=[1], seconds=0.02, disk=False)
    slow = ("dense, large", "dense, wide", "floats, wide", "dense, large vocabulary")
    return hosts.calibrate_runtime(found, probes=[p for p in PROBES if p.name not in slow], seconds=0.05)


@pytest.fixture(scope="module")
def here() -> Host:
    return calibrated()


def share_of_a_core(seconds: float = 0.2) -> float:
    """What one busy thread gets of a processor just now: 1 on an idle machine."""
    started, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        pass
    return (time.process_time() - used) / (time.perf_counter() - started)


def test_this_machine_is_measured(here):
    q = here.profile.quantities
    assert q["dram_bytes_per_s"].how == "measured" and q["memory_bytes"].value > q["usable_bytes"].value > 0
    assert here.profile.kind == "host" and here.integer_peak[1] == q["cpu_int8_ops_per_s"].value
    for absent in ("cpu_w", "battery_wh", "flash_bytes_per_s", "sustained_share"):
        assert (absent in q) != (absent in here.lacks), absent  # there, or with a reason why not
    assert all(reason for reason in here.lacks.values())
    assert Host.from_json(here.to_json()) == here and "<table>" in here._repr_html_()
    with pytest.raises(ValueError, match="use numbers from 1 to"):
        hosts.measure_host(threads=[0])


def test_our_decoding_is_predicted(here):
    """Within 25 per cent in the best of three attempts, each with a calibration just before the measurement: what else runs changes between
    two of them, and a calibration that was disturbed says nothing of the model. A machine that is measurably busy and is within 50 per cent
    is skipped; beyond that it fails, busy or not. The bar of the command line is 15 per cent (`calibrate-host --limit 0.15`), all probes.
    """
    phone = data_dir() / "edge-phone"
    tried, shares = [], []
    for attempt in range(3):
        host = calibrated() if attempt else here
        shares.append(share_of_a_core())
        (found,) = hosts.compare_with_runtime(phone, host=host, seconds=0.3)
        assert found.model == "edge-phone" and found.measured_s > 0
        tried.append(abs(found.error))
        if tried[-1] <= 0.25:
            break
    said = f"off by {', '.join(f'{e:.0%}' for e in tried)}; one thread got {', '.join(f'{x:.0%}' for x in shares)} of a core"
    if min(tried) > 0.25 and min(tried) <= 0.5 and max(shares) < 0.9:
        pytest.skip(f"busy machine: {said}")
    assert min(tried) <= 0.25, said


def test_a_larger_model_is_predicted_to_be_slower(here):
    blank = hosts.predict_host(data_dir() / "edge-phone", host=here)
    assert blank.measured_s is None and blank.error is None
    larger = hosts.predict_host(data_dir() / "edge-dense", host=here)
    assert larger.seconds > blank.seconds  # 13 MB of floats against 1.5 MB of codes


def test_probes_in_a_file_of_their_own_sizes():
    assert len({p.name for p in PROBES}) == len(PROBES) and {p.scheme for p in PROBES} >= {None, "int2-g32", "int4-g32"}
    small = Probe("x", probes._dense(1, 64, 128, vocab=64))
    a, b = (probe_model(small, seed=s).lm_head.packed for s in (0, 0))
    assert (a == b).all()


def test_calibrate_host_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "SIZES", (MIB, 2 * MIB))
    result = CliRunner().invoke(app, ["calibrate-host", "--quick", "--threads", "1", "--out", str(tmp_path / "h.json"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["host"]["machine"] == machine() and hosts.saved_host(tmp_path / "h.json").runtime == {}
    result = CliRunner().invoke(app, ["calibrate-host", str(data_dir() / "edge-phone"), "--quick"])
    assert result.exit_code == 2 and "--quick times no probes" in result.output
