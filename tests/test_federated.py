"""Federated averaging: exact means, each update once, the same on a cluster that loses a worker, and what it brings."""

import contextlib
import math
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from small_models import one_layer_deepseek, tiny

from edgelab import adapt, federated
from edgelab.federated import Base, Collected, FedAvg, RoundError, Task, average, by_kind, descend, packed, work
from edgelab.model import load_tokenizer
from edgelab.paths import data_dir
from edgelab.private import Examples, epsilon, losses
from edgelab.report import Report
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


def collected(number, clients, shape=(4, 2), settings=QUICK, identity=None) -> Collected:
    return Collected(number, clients, {"x.b": torch.zeros(shape)}, settings, identity)


def small(shape=(4, 2)) -> dict:
    return {"x.b": 0.01 * torch.randn(shape)}


def test_the_mean_is_weighted_by_examples_whoever_is_first():
    deltas, sizes, means = [small() for _ in range(3)], [5, 9, 14], []
    for order in ([0, 1, 2], [2, 0, 1]):
        got = collected(0, range(3))
        for c in order:
            got.take(c, update(0, c, sizes[c], deltas[c]))
        means.append(got.mean()["x.b"])
        torch.testing.assert_close(means[-1], sum(n * d["x.b"] for n, d in zip(sizes, deltas, strict=True)) / 28)
    assert torch.equal(*means)  # bit for bit
    without = collected(0, range(3))
    for c in (0, 2):
        without.take(c, update(0, c, sizes[c], deltas[c]))
    torch.testing.assert_close(without.mean()["x.b"], (5 * deltas[0]["x.b"] + 14 * deltas[2]["x.b"]) / 19)


def test_an_update_counts_once_and_in_its_round():
    got, x = collected(3, [0, 1]), {"x.b": torch.full((4, 2), 0.02)}
    good = update(3, 0, 5, x)
    got.take(0, good)
    for sender, raw, says in (
        (0, good, r"client 0 sent an update of round 3 already; a second one does not count"),
        (1, update(2, 1, 5, x), "client 1 in round 3 does not count: it is of round 2, this is round 3"),
        (7, update(3, 7, 5, x), "client 7 was not asked in round 3"),
        (1, good, "client 1 in round 3 does not count: it says that it is client 0's"),
    ):
        with pytest.raises(RoundError, match=says):
            got.take(sender, raw)
    assert list(got.deltas) == [0] and torch.equal(got.mean()["x.b"], x["x.b"])
    with pytest.raises(RoundError, match="no client answered in round 1"):
        collected(1, [0]).mean()


# ------------------------------------------------------------------------------------------------- clients that lie

BAD = {
    "far": (update(0, 1, 5, {"x.b": torch.full((4, 2), 1e9)}), r"a number moved by 1e\+09; 2 steps of Adam move none by more than 0.291"),
    "negative": (update(0, 1, -5, small()), r"n=-5 examples; n must be 1 to 10,000 \(FedAvg.most\)"),
    "none": (update(0, 1, 0, small()), "n=0 examples"),
    "many": (update(0, 1, 10**9, small()), "n=1000000000 examples"),
    "name": (update(0, 1, 5, {"y.b": torch.zeros(4, 2)}), "its layers are not those sent out: 'x.b' is in one alone"),
    "more": (update(0, 1, 5, small() | {"y.b": torch.zeros(1)}), "its layers are not those sent out: 'y.b' is in one alone"),
    "shape": (update(0, 1, 5, {"x.b": torch.zeros(2, 4)}), r"x.b is torch.float32 \(2, 4\), sent out was torch.float32 \(4, 2\)"),
    "scalar": (update(0, 1, 5, {"x.b": torch.zeros(())}), r"x.b is torch.float32 \(\)"),  # which would broadcast
    "dtype": (update(0, 1, 5, {"x.b": torch.zeros(4, 2, dtype=torch.float64)}), "x.b is torch.float64"),
    "nan": (update(0, 1, 5, {"x.b": torch.full((4, 2), float("nan"))}), "x.b holds numbers that are not finite"),
    "inf": (update(0, 1, 5, {"x.b": torch.full((4, 2), float("inf"))}), "x.b holds numbers that are not finite"),
    "about": (bytes_of(small() | {"about": torch.tensor([0.0, 1.0, 5.0])}), r"lacks `about`, int64 \[round, client, examples\]"),
    "no about": (bytes_of(small()), "lacks `about`"),
    "garbage": (bytes(range(100)), "100 bytes are no tensors in the format of safetensors"),
    "nothing": (b"", "0 bytes are no tensors"),
    "cut": (update(0, 1, 5, small())[:-3], "are no tensors"),
    "long": (update(0, 1, 5, small() | {"y": torch.zeros(10_000)}), "it has 40,.* bytes, an honest one at most 16,672"),
}


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_refused_with_its_client_and_the_reason(kind, clip):
    raw, says = BAD[kind]
    got = collected(0, range(2), settings=replace(QUICK, clip=clip))
    got.take(0, update(0, 0, 5, x := small()))
    if kind == "far" and clip:  # it counts for no more than anyone
        got.take(1, raw)
        assert float(got.deltas[1][1]["x.b"].norm()) == pytest.approx(1.0)
        return
    with pytest.raises(RoundError, match=rf"^the update of client 1 in round 0 does not count: .*{says}"):
        got.take(1, raw)
    torch.testing.assert_close(got.mean()["x.b"], x["x.b"] / (2 if clip else 1))
    got.take(1, update(0, 1, 5, small()))  # a bad one does not take the place of a good one


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_changed_bytes_never_break_the_server(data):
    raw = bytearray(update(0, 1, 5, small()))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    got = collected(0, range(2))
    with contextlib.suppress(RoundError):
        got.take(1, bytes(raw))
    assert all(t["x.b"].abs().max() < 0.3 and 1 <= n <= 10_000 for n, t in got.deltas.values())


def test_garbage_that_comes_sealed_is_refused_too():
    pytest.importorskip("cryptography", reason="the extra `privacy` is not installed")
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    from edgelab.features import Caller, Envelope, Identity, seal

    got = collected(0, range(2), identity=Identity())
    caller = Caller(got.keys[0])
    session = caller.finish(got.keys[1])
    header = seal(session, small()).header
    junk = Envelope(header, ChaCha20Poly1305(session.send_key).encrypt(bytes(12), b"junk", header))
    deep = Envelope(b"[" * 60_000, bytes(16))
    for raw, says in (
        (bytes(100), "no public key"),
        (b"short", "no public key"),
        (caller.hello + bytes(50), "are no sealed message"),
        (caller.hello + junk.to_bytes(), "4 bytes are no tensors"),
        (caller.hello + Envelope(b"[" * 10_000, bytes(16)).to_bytes(), "no JSON"),
        (caller.hello + deep.to_bytes(), "an honest one at most"),
    ):
        with pytest.raises(RoundError, match=rf"^the update of client 1 in round 0 does not count: .*{says}"):
            got.take(1, raw)


def test_no_count_of_examples_takes_the_mean_of_clipped_updates():
    """Nine clients at 0, one that claims all the examples there can be and sends 1e9."""
    got = collected(0, range(10), settings=replace(QUICK, clip=0.5))
    for c in range(9):
        got.take(c, update(0, c, 1, {"x.b": torch.zeros(4, 2)}))
    got.take(9, update(0, 9, 10_000, {"x.b": torch.full((4, 2), 1e9)}))
    assert float(got.mean()["x.b"].norm()) == pytest.approx(0.5 / 10)
    huge = collected(0, range(2), settings=replace(QUICK, clip=0.5))
    huge.take(0, update(0, 0, 1, {"x.b": torch.full((4, 2), 3e38)}))
    assert float(huge.deltas[0][1]["x.b"].norm()) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 4, 200])
def test_adam_stays_within_its_reach(steps):
    """Also where one large gradient comes after many small ones, its worst case."""
    s = FedAvg(steps=steps, lr=0.1)
    for grads in (torch.ones(steps), 0.9 ** -torch.arange(steps).double(), torch.eye(steps)[-1] + 1e-6, torch.randn(steps)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adam([p], lr=s.lr, betas=(0.9, 0.999))
        for g in grads:
            p.grad = g.double().reshape(1)
            optimizer.step()
        assert 0 < float(p.detach().abs()) <= s.reach


def test_a_round_goes_on_without_a_bad_client(base, monkeypatch):
    def lying(task):
        return b"PK garbage" if task.client == 1 and task.round == 0 else work(task)

    monkeypatch.setattr(federated, "work", lying)
    with pytest.warns(UserWarning, match="client 1 in round 0 does not count: 10 bytes are no tensors .*; the round goes on without it"):
        ran = average(base, CLIENTS, QUICK, progress=False)
    assert [r.arrived for r in ran.rounds] == [(0, 2), (0, 1, 2)] and [r.missing for r in ran.rounds] == [(1,), ()]
    assert len(ran.rounds[0].refused) == 1 and "1 updates missing, 1 refused" in repr(ran)
    first = average(base, CLIENTS, QUICK, engine=Stalled(silent=0), progress=False)  # as if it had never answered
    close(ran.state, first.state)


@pytest.mark.parametrize("mode", ["ffa", "both"])
def test_the_mean_of_products_is_met_only_with_a_frozen(base, mode):
    """Against products that are made one by one."""
    base = replace(base, mode=mode)
    start = base.adapters()
    start.load({n: 0.3 * torch.randn(p.shape) for n, p in start.parameters().items()})
    state = start.state()
    got = Collected(0, range(3), state, replace(QUICK, steps=4))
    products = {name: torch.zeros(b.shape[0], start.a[name].shape[1]) for name, b in start.b.items()}
    for i, data in enumerate(CLIENTS):
        raw = work(Task(base, replace(QUICK, steps=4), i, 0, packed(data), bytes_of(state)))
        got.take(i, raw)
        mine = base.adapters()
        delta = {n: t for n, t in tensors_of(raw).items() if n != "about"}
        mine.load({n: state[n] + d for n, d in delta.items()})
        for name in products:
            products[name] += len(data) / 28 * (mine.b[name] @ mine.a[name]).detach()
    mean = got.mean()
    after = base.adapters()
    after.load({n: state[n] + mean[n] for n in state})
    missed = sum(float((after.b[n] @ after.a[n] - products[n]).detach().pow(2).sum()) for n in products) ** 0.5
    whole = sum(float(p.pow(2).sum()) for p in products.values()) ** 0.5
    gap = got.gap()
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


@pytest.mark.parametrize("mode", ["ffa", "both"])
def test_rounds_learn_what_all_clients_hold(base, mode):
    base = replace(base, mode=mode)
    before = base.adapters()
    ran = average(base, CLIENTS, replace(QUICK, rounds=6, steps=4), progress=False)
    after = base.adapters()
    after.load(ran.state)
    for data in CLIENTS:
        assert losses(after, data).mean() < losses(before, data).mean()
    sent = sum(t.nbytes for t in ran.state.values())
    for r in ran.rounds:
        assert r.arrived == (0, 1, 2) and r.missing == r.refused == () and (r.gap == 0) == (mode == "ffa")
        assert 3 * sent < r.bytes_up < 3 * (sent + 4000) and 3 * sent < r.bytes_down < 3 * (sent + 4000)
    assert "0 updates missing, 0 refused" in repr(ran)


def test_sealed_updates_give_the_same_and_show_nothing(base):
    pytest.importorskip("cryptography", reason="the extra `privacy` is not installed")
    from edgelab.features import Identity

    plain, sealed = (average(base, CLIENTS, replace(QUICK, sealed=s), progress=False) for s in (False, True))
    close(plain.state, sealed.state)
    state = base.adapters().state()
    round_ = Collected(0, range(3), state, QUICK, Identity())
    task = Task(base, QUICK, 1, 0, packed(CLIENTS[1]), bytes_of(state), round_.keys)
    raw, open_one = work(task), work(replace(task, keys=None))
    values = tensors_of(open_one)
    name = max((n for n in values if n != "about"), key=lambda n: float(values[n].abs().sum()))
    assert values[name].numpy().tobytes() in open_one and values[name].numpy().tobytes() not in raw
    again = work(task)
    assert raw != again  # a task that ran twice sealed with another key
    round_.take(1, raw)
    with pytest.raises(RoundError, match="already"):
        round_.take(1, again)
    with pytest.raises(RoundError, match="client 1 in round 0 does not count: the message was sealed in session"):
        Collected(0, range(3), state, QUICK, Identity()).take(1, raw)


def test_clip_bounds_a_client_and_noise_has_its_size(base):
    s = replace(QUICK, clip=0.01, noise=2.0)
    delta = tensors_of(work(Task(base, s, 0, 0, packed(CLIENTS[0]), bytes_of(base.adapters().state()))))
    delta.pop("about")
    assert sum(float(t.double().pow(2).sum()) for t in delta.values()) ** 0.5 == pytest.approx(0.01, rel=1e-5)
    got = collected(0, range(4), (200, 50), replace(s, clip=1.0))
    got.take(0, update(0, 0, 100, {"x.b": torch.zeros(200, 50)}))
    got.take(1, update(0, 1, 1, {"x.b": torch.full((200, 50), 0.008)}))
    for mean in (got.mean(torch.Generator().manual_seed(0))["x.b"], got.mean()["x.b"]):  # five standard errors
        assert float(mean.mean()) == pytest.approx(0.008 / 4, abs=5 * 0.5 / 100)  # clients weigh alike, over all that were asked
        assert float(mean.std()) == pytest.approx(2.0 * 1.0 / 4, rel=5 / 140)
    quiet = collected(0, range(4), (200, 50), replace(s, clip=1.0, noise=0.0))
    quiet.deltas = got.deltas
    torch.testing.assert_close(quiet.mean()["x.b"], torch.full((200, 50), 0.008 / 4))
    assert s.epsilon(1e-5) == epsilon(2.0, 1.0, 2, 1e-5)
    for call, says in (
        (lambda: FedAvg(noise=1.0), "noise hides an update only when clip bounds it"),
        (lambda: FedAvg(rounds=0), "rounds=0"),
        (lambda: FedAvg(most=0), "most=0 must be 1 or more"),
        (lambda: Base("x", mode="mean"), "mode='mean' is not known"),
        (lambda: average(base, [], QUICK), "0 clients"),
        (lambda: average(base, CLIENTS, QUICK, engine="ray"), "engine='ray' is not known; use 'local'"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_noise_is_the_systems_and_known_noise_promises_nothing(base):
    s = replace(QUICK, rounds=1, clip=0.01, noise=1.0)
    again = [average(base, CLIENTS, s, progress=False) for _ in range(2)]  # of one seed
    assert all(not torch.equal(again[0].state[n], again[1].state[n]) for n in again[0].state) and "private" not in repr(again[0])
    known = [average(base, CLIENTS, replace(s, noise_seed=3), progress=False) for _ in range(2)]
    close(known[0].state, known[1].state, atol=0)
    assert known[0].noise_known and "not private: the noise is known" in repr(known[0])
    with pytest.raises(ValueError, match="noise_seed=3: not private, the noise is known"):
        replace(s, noise_seed=3).epsilon(1e-5)
    assert replace(s, seed=5).epsilon(1e-5) == s.epsilon(1e-5) < math.inf  # the seed of batches is no seed of noise


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
    """A stand-in for an engine whose client 1 never answers in round `silent`."""

    def __init__(self, silent: int) -> None:
        self.silent = silent


@pytest.fixture(autouse=True)
def stalled(monkeypatch):
    real = federated._on_workers

    def on_workers(engine, tasks, timeout_s):
        if not isinstance(engine, Stalled):
            return real(engine, tasks, timeout_s)
        return ((t.client, work(t)) for t in tasks if t.client != 1 or t.round != engine.silent)

    monkeypatch.setattr(federated, "_on_workers", on_workers)


def test_a_client_that_never_answers_is_left_out_with_its_weight(base):
    s = replace(QUICK, rounds=1)
    ran = average(base, CLIENTS, s, engine=Stalled(0), progress=False)
    assert ran.rounds[0].missing == (1,) and ran.rounds[0].arrived == (0, 2)
    state = base.adapters().state()
    deltas = [tensors_of(work(Task(base, s, i, 0, packed(CLIENTS[i]), bytes_of(state)))) for i in (0, 2)]
    close(ran.state, {n: state[n] + (5 * deltas[0][n] + 14 * deltas[1][n]) / 19 for n in state})


# --------------------------------------------------------------------------------------------------------------- study


def test_the_stored_study_says_what_averaging_brings():
    report = read("federated").report

    def row(model, metric):
        return report.get(model=model, metric=metric)

    for frozen in ("", ", A frozen"):
        for metric, better in (("tokens_right", 1), ("nll", -1)):
            alone, together, pooled = (row(m + frozen, metric) for m in ("alone", "federated", "pooled"))
            assert better * together.value > better * alone.value and together.n == alone.n == pooled.n
            assert all(x.note.startswith("3 seeds: ") for x in (alone, together))
    gap = "gap of the mean of factors"
    assert row("federated, A frozen", gap).value == 0 < row("federated", gap).value
    assert row("federated, A frozen", "bytes up").value < row("federated", "bytes up").value
    noisy = next(m for m in report.models() if "noise" in m)
    assert row(noisy, "epsilon").value == pytest.approx(replace(federated._STUDY, clip=1.0, noise=float(noisy.split()[-1])).epsilon(1e-5))
    assert np.isfinite([r.value for r in report]).all()


def test_the_default_is_what_the_study_favours():
    """Both factors, unless the mean of A frozen, which is exact, answers more."""
    report = read("federated").report
    both, frozen = (report.get(model=m, metric="exact_match") for m in ("federated", "federated, A frozen"))
    assert Base("x").mode == ("both" if both.low > frozen.high else "ffa")


def test_figures_and_sentences_say_what_the_rows_hold():
    from edgelab.privacy_plots import cost_figure, say_federated, say_private

    report = read("federated").report
    fig = cost_figure(report, "nll")
    rows = report.where(metric="nll").rows
    assert list(fig.data[0].x) == [r.model for r in rows] and list(fig.data[0].y) == [round(r.value, 3) for r in rows]
    said = say_federated(report)
    for kind in ("alone", "alone, own kind", "federated", "pooled", "alone, A frozen, own kind", "federated, A frozen"):
        assert report.get(model=kind, metric="exact_match").text(2) in said
    worse = replace(report.get(model="federated, A frozen", metric="exact_match"), value=0.9)
    other = Report(tuple(worse if (r.model, r.metric) == (worse.model, worse.metric) else r for r in report))
    assert "averaging FFA adapters costs each device" in said and "averaging FFA adapters gives each device" in say_federated(other)
    told = say_private(read("private").report)
    assert told.count("AUC") == 1 + len(read("private").report.where(metric="auc odd ones"))
    with pytest.raises(ValueError, match=r"metric='auc' is in no row; there are exact_match"):
        cost_figure(report, "auc")
