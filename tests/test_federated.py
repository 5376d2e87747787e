"""Federated averaging: exact means, each update once, the same on a cluster that loses a worker, and what it brings."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from small_models import one_layer_deepseek, tiny

from edgelab import adapt, federated
from edgelab.features import SealError
from edgelab.federated import Base, Collected, FedAvg, RoundError, Task, average, by_kind, descend, packed, work
from edgelab.model import load_tokenizer
from edgelab.paths import data_dir
from edgelab.private import Examples, epsilon, losses
from edgelab.studies import read


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(one_layer_deepseek(), None).save_pretrained(folder)
    return Base(str(folder), None, rank=2)


def drawn(n, seed, width=10) -> Examples:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (n, width), generator=g)
    scored = torch.zeros(n, width, dtype=torch.bool)
    scored[:, 4:] = True
    return Examples(ids, scored)


CLIENTS = [drawn(n, seed=i) for i, n in enumerate((5, 9, 14))]
QUICK = FedAvg(rounds=2, steps=2, batch=4, lr=2e-2)


def close(a, b, atol=1e-6):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=atol)


# --------------------------------------------------------------------------------------------------------------- means


def update(number, client, n, deltas) -> bytes:
    return bytes_of({**deltas, "about": torch.tensor([number, client, n])})


def test_the_mean_is_weighted_by_examples_whoever_is_first():
    deltas = [{"x.b": torch.randn(4, 2)} for _ in range(3)]
    sizes = [5, 9, 14]
    for order in ([0, 1, 2], [2, 0, 1]):
        got = Collected(0, range(3))
        for c in order:
            assert got.take(update(0, c, sizes[c], deltas[c])) == c
        ref = sum(n * d["x.b"] for n, d in zip(sizes, deltas, strict=True)) / 28
        torch.testing.assert_close(got.mean(QUICK)["x.b"], ref)
        first = got.mean(QUICK)["x.b"] if order[0] == 0 else first  # noqa: F821
        assert torch.equal(got.mean(QUICK)["x.b"], first)  # bit for bit
    without = Collected(0, range(3))
    for c in (0, 2):
        without.take(update(0, c, sizes[c], deltas[c]))
    torch.testing.assert_close(without.mean(QUICK)["x.b"], (5 * deltas[0]["x.b"] + 14 * deltas[2]["x.b"]) / 19)


def test_an_update_counts_once_and_in_its_round():
    got = Collected(3, [0, 1])
    good = update(3, 0, 5, {"x.b": torch.ones(2, 2)})
    got.take(good)
    for raw, says in (
        (good, r"client 0 sent an update of round 3 already; a second one does not count"),
        (update(2, 1, 5, {"x.b": torch.ones(2, 2)}), "is of round 2, this is round 3"),
        (update(3, 7, 5, {"x.b": torch.ones(2, 2)}), "client 7 was not asked in round 3"),
        (update(3, 1, 5, {"x.b": torch.full((2, 2), float("nan"))}), "not finite"),
    ):
        with pytest.raises(RoundError, match=says):
            got.take(raw)
    assert list(got.deltas) == [0] and torch.equal(got.mean(QUICK)["x.b"], torch.ones(2, 2))
    with pytest.raises(RoundError, match="no client answered in round 1"):
        Collected(1, [0]).mean(QUICK)


@pytest.mark.parametrize("mode", ["ffa", "both"])
def test_the_mean_of_products_is_met_only_with_a_frozen(base, mode):
    """Against products that are made one by one."""
    base = replace(base, mode=mode)
    start = base.adapters()
    start.load({n: 0.3 * torch.randn(p.shape) for n, p in start.parameters().items()})
    state, got = start.state(), Collected(0, range(3))
    products = {name: torch.zeros(b.shape[0], start.a[name].shape[1]) for name, b in start.b.items()}
    for i, data in enumerate(CLIENTS):
        raw = work(Task(base, replace(QUICK, steps=4), i, 0, packed(data), bytes_of(state)))
        got.take(raw)
        mine = base.adapters()
        delta = {n: t for n, t in tensors_of(raw).items() if n != "about"}
        mine.load({n: state[n] + d for n, d in delta.items()})
        for name in products:
            products[name] += len(data) / 28 * (mine.b[name] @ mine.a[name]).detach()
    mean = got.mean(QUICK)
    after = base.adapters()
    after.load({n: state[n] + mean[n] for n in state})
    missed = sum(float((after.b[n] @ after.a[n] - products[n]).detach().pow(2).sum()) for n in products) ** 0.5
    whole = sum(float(p.pow(2).sum()) for p in products.values()) ** 0.5
    gap = got.gap(state)
    if mode == "ffa":
        assert gap == 0.0 and missed / whole < 1e-6
    else:
        assert gap > 1e-4 and missed / whole == pytest.approx(gap, rel=1e-2)


# -------------------------------------------------------------------------------------------------------------- rounds


def test_one_client_alone_is_plain_learning(base):
    ran = average(base, CLIENTS[:1], QUICK, progress=False)
    alone = base.adapters()
    for number in range(2):
        descend(alone, CLIENTS[0], 2, 4, 2e-2 * (1 - number / 2), (0, number, 0))
    close(ran.state, alone.state())


def test_rounds_learn_what_all_clients_hold(base):
    before = base.adapters()
    ran = average(base, CLIENTS, replace(QUICK, rounds=6, steps=4), progress=False)
    after = base.adapters()
    after.load(ran.state)
    for data in CLIENTS:
        assert losses(after, data).mean() < losses(before, data).mean()
    sent = sum(t.nbytes for t in ran.state.values())
    for r in ran.rounds:
        assert r.arrived == (0, 1, 2) and r.missing == () and r.gap == 0
        assert 3 * sent < r.bytes_up < 3 * (sent + 4000) and 3 * sent < r.bytes_down < 3 * (sent + 4000)
    assert "0 updates missing" in repr(ran)


def test_sealed_updates_give_the_same_and_show_nothing(base):
    pytest.importorskip("cryptography", reason="the extra `privacy` is not installed")
    from edgelab.features import Identity

    plain, sealed = (average(base, CLIENTS, replace(QUICK, sealed=s), progress=False) for s in (False, True))
    close(plain.state, sealed.state)
    round_ = Collected(0, range(3), Identity())
    state = base.adapters().state()
    task = Task(base, QUICK, 1, 0, packed(CLIENTS[1]), bytes_of(state), round_.keys)
    raw, open_one = work(task), work(replace(task, keys=None))
    values = tensors_of(open_one)
    name = max((n for n in values if n != "about"), key=lambda n: float(values[n].abs().sum()))
    assert values[name].numpy().tobytes() in open_one and values[name].numpy().tobytes() not in raw
    again = work(task)
    assert raw != again  # a task that ran twice sealed with another key
    round_.take(raw)
    with pytest.raises(RoundError, match="already"):
        round_.take(again)
    with pytest.raises(SealError):
        Collected(0, range(3), Identity()).take(raw)


def test_clip_bounds_a_client_and_noise_has_its_size(base):
    s = replace(QUICK, clip=0.01, noise=2.0)
    delta = tensors_of(work(Task(base, s, 0, 0, packed(CLIENTS[0]), bytes_of(base.adapters().state()))))
    delta.pop("about")
    assert sum(float(t.double().pow(2).sum()) for t in delta.values()) ** 0.5 == pytest.approx(0.01, rel=1e-5)
    got = Collected(0, range(4))
    got.take(update(0, 0, 100, {"x.b": torch.zeros(200, 50)}))
    got.take(update(0, 1, 1, {"x.b": torch.full((200, 50), 0.001)}))
    mean = got.mean(s, torch.Generator().manual_seed(0))["x.b"]
    assert float(mean.mean()) == pytest.approx(0.001 / 4, abs=2e-4)  # clients weigh alike, over all that were asked
    assert float(mean.std()) == pytest.approx(2.0 * 0.01 / 4, rel=0.03)
    assert s.epsilon(1e-5) == epsilon(2.0, 1.0, 2, 1e-5)
    for call, says in (
        (lambda: FedAvg(noise=1.0), "noise hides an update only when clip bounds it"),
        (lambda: FedAvg(rounds=0), "rounds=0"),
        (lambda: Base("x", mode="mean"), "mode='mean' is not known"),
        (lambda: average(base, [], QUICK), "0 clients"),
        (lambda: average(base, CLIENTS, QUICK, engine="ray"), "engine='ray' is not known; use 'local'"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_devices_hold_one_kind_each():
    data = adapt.commands(60, tests=5)["train"]
    parts = by_kind(load_tokenizer(data_dir() / "edge-moe"), data)
    assert set(parts) == {"move", "turn", "grasp", "bring", "drive", "look"} and sum(map(len, parts.values())) == 60


# -------------------------------------------------------------------------------------------------------------- engine


def test_a_cluster_that_loses_a_worker_gives_the_same_adapters(base):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    psutil = pytest.importorskip("psutil")
    assert distributed
    s = FedAvg(rounds=2, steps=60, batch=4, lr=1e-2)  # long enough to be interrupted
    want = average(base, CLIENTS, s, progress=False)
    with federated.cluster(2) as client:
        pids = set(client.run(os.getpid).values())
        assert len(pids) == 2 and os.getpid() not in pids
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        killed = []

        def kill_a_busy_worker():
            until = time.monotonic() + 60
            while time.monotonic() < until and not killed:
                for address, keys in client.processing().items():
                    if any("update-" in str(k) for k in keys):
                        pid = client.run(os.getpid, workers=[address], on_error="ignore").get(address)
                        if pid:
                            os.kill(pid, signal.SIGKILL)
                            killed.append(pid)
                            return
                time.sleep(0.05)

        thread = threading.Thread(target=kill_a_busy_worker)
        thread.start()
        got = average(base, CLIENTS, s, engine=client, progress=False)
        thread.join()
        assert killed and killed[0] in pids
    assert [r.arrived for r in got.rounds] == [(0, 1, 2), (0, 1, 2)] and not any(r.missing for r in got.rounds)
    close(got.state, want.state, atol=1e-4)


class Stalled:
    """A stand-in for an engine whose client 1 never answers."""

    def submit(self, function, task, **kwargs):
        return None if task.client == 1 else function(task)


def test_a_client_that_never_answers_is_left_out_with_its_weight(base, monkeypatch):
    def on_workers(engine, tasks, timeout_s):
        return (raw for raw in (engine.submit(work, t) for t in tasks) if raw is not None)

    monkeypatch.setattr(federated, "_on_workers", on_workers)
    s = replace(QUICK, rounds=1)
    ran = average(base, CLIENTS, s, engine=Stalled(), progress=False)
    assert ran.rounds[0].missing == (1,) and ran.rounds[0].arrived == (0, 2)
    state = base.adapters().state()
    deltas = [tensors_of(work(Task(base, s, i, 0, packed(CLIENTS[i]), bytes_of(state)))) for i in (0, 2)]
    close(ran.state, {n: state[n] + (5 * deltas[0][n] + 14 * deltas[1][n]) / 19 for n in state})


# --------------------------------------------------------------------------------------------------------------- study


def test_the_stored_study_says_what_averaging_brings():
    report = read("federated").report

    def row(model, metric):
        return report.get(model=model, metric=metric)

    for metric, better in (("tokens_right", 1), ("nll", -1)):
        alone, together, pooled = (row(m, metric) for m in ("alone", "federated", "pooled"))
        assert better * together.value > better * alone.value and together.n == alone.n == pooled.n
    assert row("federated", "gap of the mean of factors").value == 0 < row("federated, both factors", "gap of the mean of factors").value
    assert row("federated", "bytes up").value < row("federated, both factors", "bytes up").value
    noisy = next(m for m in report.models() if m.startswith("federated, noise"))
    assert row(noisy, "epsilon").value == pytest.approx(replace(federated._STUDY, clip=1.0, noise=float(noisy.split()[-1])).epsilon(1e-5))
    assert np.isfinite([r.value for r in report]).all()


def test_figures_and_sentences_say_what_the_rows_hold():
    from edgelab.privacy_plots import cost_figure, say_federated, say_private

    report = read("federated").report
    fig = cost_figure(report, "nll")
    rows = report.where(metric="nll").rows
    assert list(fig.data[0].x) == [r.model for r in rows] and list(fig.data[0].y) == [round(r.value, 3) for r in rows]
    assert report.get(model="pooled", metric="exact_match").text(2) in say_federated(report)
    told = say_private(read("private").report)
    assert told.count("AUC") == 1 + len(read("private").report.where(metric="auc odd ones"))
    with pytest.raises(ValueError, match=r"metric='auc' is in no row; there are exact_match"):
        cost_figure(report, "auc")
