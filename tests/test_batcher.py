"""The batcher on an engine whose every slot is a state machine: a token in the wrong slot, or a stale row, changes all that follows."""

import math
import random
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.batcher import Batcher, Closed, QueueFull
from edgelab.monitor import Monitor
from edgelab.sampling import greedy

VOCAB, BAD_PROMPT, POISON = 97, 90, 91  # a prompt with 90 can't be read; a step with token 91 raises


def fold(state: int, token: int) -> int:
    return (state * 31 + token + 1) % 1_000_003


def said(state: int) -> int:
    return state * 7 % 89  # never a special token


def expected(ids, n: int, stop=()) -> list[int]:
    """What a request writes when it is alone, without any engine."""
    state, out = 17, []
    for i in ids:
        state = fold(state, i)
    while len(out) < n and (token := said(state)) not in stop:
        out.append(token)
        state = fold(state, token)
    return out


class Engine:
    """Checks its callers, and hands out the same buffer each time."""

    def __init__(self, slots: int = 8, continuous: bool = True) -> None:
        self.slots, self.continuous = slots, continuous
        self.state: dict[int, int] = {}
        self.sizes: list[int] = []
        self.prompts: list[list[int]] = []
        self.buffer = np.zeros((slots, VOCAB), np.float32)
        self.busy = threading.Lock()
        self.cost, self.clock = 0.0, None
        self.stuck: set[int] = set()

    def _logits(self, states) -> np.ndarray:
        self.buffer[:] = np.nan
        for row, state in zip(self.buffer, states, strict=False):
            row[:] = -np.abs(np.arange(VOCAB) - said(state))
        return self.buffer[: len(states)]

    def admit(self, slot, ids):
        assert self.busy.acquire(blocking=False), "two threads in the engine"
        try:
            assert 0 <= slot < self.slots and slot not in self.state, f"slot {slot} is taken"
            self.prompts.append(list(ids))
            if BAD_PROMPT in ids:
                raise ValueError("a prompt that can't be read")
            state = 17
            for i in ids:
                state = fold(state, i)
            self.state[slot] = state
            return self._logits([state])[0]
        finally:
            self.busy.release()

    def step(self, slots, tokens):
        assert self.busy.acquire(blocking=False), "two threads in the engine"
        try:
            assert len(slots) == len(tokens) == len(set(slots)) >= 1 and set(slots) <= set(self.state)
            if POISON in tokens:
                raise RuntimeError("a token that can't be computed")
            self.sizes.append(len(slots))
            for s, t in zip(slots, tokens, strict=True):
                self.state[s] = fold(self.state[s], t)
            if self.clock is not None:
                self.clock.now += self.cost
            return self._logits([self.state[s] for s in slots])
        finally:
            self.busy.release()

    def release(self, slot):
        if slot in self.stuck:
            raise OSError(f"slot {slot} is stuck")
        self.state.pop(slot, None)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def by_hand(engine: Engine, **kwargs) -> tuple[Batcher, Clock]:
    clock = Clock()
    return Batcher(engine, start=False, clock=clock, **kwargs), clock


def drain(batcher: Batcher) -> None:
    while (wait := batcher.turn()) is not None:
        batcher._clock.now += wait + 1e-9 * (wait > 0)


# --------------------------------------------------------------------------------------------------------- when it starts


def test_it_starts_with_two_or_at_the_deadline():
    batcher, clock = by_hand(Engine(), deadline_ms=50)
    assert batcher.turn() is None
    a = batcher.submit([1, 2], 3)
    assert batcher.turn() == pytest.approx(0.05) and batcher.engine.prompts == []
    clock.now = 0.03
    assert batcher.turn() == pytest.approx(0.02) and not a.done()
    clock.now = 0.05
    drain(batcher)
    assert a.result(0) == expected([1, 2], 3) and a.queue_s == pytest.approx(0.05)
    b, c = batcher.submit([3], 2), batcher.submit([4], 2)
    assert batcher.turn() == 0.0 and batcher.engine.prompts == [[1, 2], [3], [4]]  # no waiting: there are two
    drain(batcher)
    assert (b.result(0), c.result(0)) == (expected([3], 2), expected([4], 2)) and b.queue_s == 0
    assert batcher.engine.sizes == [1, 1, 2] and batcher.numbers().batch_sizes == {1: 2, 2: 1}


def test_never_more_than_most():
    batcher, _ = by_hand(Engine(8), most=3)
    tickets = [batcher.submit([i], 4) for i in range(10)]
    drain(batcher)
    assert max(batcher.engine.sizes) == 3 and [t.result(0) for t in tickets] == [expected([i], 4) for i in range(10)]
    assert batcher.engine.prompts == [[i] for i in range(10)]  # first come, first served
    assert batcher.engine.state == {}


def test_rows_join_and_leave_between_steps():
    engine = Engine()
    batcher, _ = by_hand(engine, least=1, joins=1)
    long = batcher.submit([1], 12)
    batcher.turn()
    shorts = [batcher.submit([i], 3) for i in (2, 3, 4)]
    batcher.turn()
    assert len(engine.prompts) == 2  # one per step, so that the long one is not held up by all prompts at once
    drain(batcher)
    assert long.result(0) == expected([1], 12) and [s.result(0) for s in shorts] == [expected([i], 3) for i in (2, 3, 4)]
    assert engine.sizes[:6] == [1, 2, 3, 3, 2, 1] and set(engine.sizes[6:]) == {1}


def test_an_engine_that_takes_nobody_in_finishes_its_batch_first():
    engine = Engine(continuous=False)
    batcher, _ = by_hand(engine, least=2, deadline_ms=10)
    first = [batcher.submit([i], n) for i, n in ((1, 6), (2, 2))]
    batcher.turn()
    late = [batcher.submit([i], 3) for i in (3, 4, 5)]
    while not first[0].done():
        batcher.turn()
    assert len(engine.prompts) == 2
    drain(batcher)
    assert [t.result(0) for t in (*first, *late)] == [expected([i], n) for i, n in ((1, 6), (2, 2), (3, 3), (4, 3), (5, 3))]
    assert engine.sizes == [2, 1, 1, 1, 1, 3, 3]


# ------------------------------------------------------------------------------------------------- any order of arrival

request = st.tuples(
    st.floats(0, 0.08),  # after the one before
    st.lists(st.integers(0, 88), min_size=1, max_size=5),
    st.integers(1, 9),
    st.booleans(),  # has stop tokens
    st.one_of(st.none(), st.none(), st.floats(0, 0.2)),  # cancelled so long after
)


@settings(deadline=None, max_examples=120)
@given(st.lists(request, min_size=1, max_size=25), st.integers(1, 4), st.integers(0, 6), st.integers(1, 3), st.booleans())
def test_any_order_of_arrival_gives_everybody_his_own(requests, least, extra, joins, continuous):
    engine = Engine(least + extra, continuous)
    batcher, clock = by_hand(engine, least=least, most=least + extra, deadline_ms=30, joins=joins)
    engine.clock, engine.cost = clock, 0.01
    at, todo = 0.0, []
    for wait, ids, n, stops, cancel in requests:
        at += wait
        todo.append((at, ids, n, tuple(range(0, 89, 4)) if stops else (), None if cancel is None else at + cancel))
    tickets, arrived = [], 0
    while arrived < len(todo) or not all(t.done() for t in tickets):
        while arrived < len(todo) and todo[arrived][0] <= clock.now:
            _, ids, n, stop, _ = todo[arrived]
            tickets.append(batcher.submit(ids, n, stop=stop))
            arrived += 1
        for ticket, (*_, cancel) in zip(tickets, todo, strict=False):
            if cancel is not None and cancel <= clock.now:
                ticket.cancel()
        running = [t for t in tickets if not t.done() and not t._cancelled and not math.isnan(t.queue_s)]
        resting, before = not running, len(engine.prompts)
        waiting = [t for t in tickets if not t.done() and not t._cancelled and math.isnan(t.queue_s)]
        oldest = waiting[0]._came if waiting else math.inf
        now = clock.now
        wait = batcher.turn()
        entered = len(engine.prompts) - before
        if resting and entered:
            assert len(waiting) >= least or now - oldest >= 0.03 - 1e-9
            assert entered == min(len(waiting), least + extra)
        if not resting and entered:
            assert continuous and entered <= joins
        coming = [t for t, *_ in todo[arrived:]] + [c for *_, c in todo if c is not None and c > clock.now]
        if wait != 0.0 and (coming or wait):
            clock.now = min([*coming, clock.now + (math.inf if wait is None else wait + 1e-9)])
    assert max(engine.sizes, default=0) <= least + extra and engine.state == {}
    for ticket, (_, ids, n, stop, cancel) in zip(tickets, todo, strict=True):
        alone = expected(ids, n, stop)
        try:
            assert ticket.result(0) == alone
        except CancelledError:
            assert cancel is not None and ticket.tokens == alone[: len(ticket.tokens)]
    admitted = [t for t in tickets if not math.isnan(t.queue_s)]
    assert engine.prompts == [t.ids for t in admitted]  # in the order of arrival
    numbers = batcher.numbers()
    assert numbers.finished + numbers.cancelled == len(todo) and numbers.failed == numbers.waiting == numbers.running == 0
    assert numbers.tokens == sum(len(t.tokens) for t in tickets) and numbers.steps == len(engine.sizes)
    assert sum(k * n for k, n in numbers.batch_sizes.items()) == sum(engine.sizes)
    assert list(numbers.queue_s) == [t.queue_s for t in admitted]


def test_many_threads():
    engine, results = Engine(), {}
    draw = random.Random(0)
    work = [([draw.randrange(89) for _ in range(draw.randint(1, 6))], draw.randint(1, 12), draw.random() * 0.004) for _ in range(80)]

    def client(mine):
        for i in mine:
            ids, n, pause = work[i]
            time.sleep(pause)
            ticket = batcher.submit(ids, n)
            results[i] = list(ticket) if i % 2 else ticket.result(20)

    with Batcher(engine, deadline_ms=2) as batcher:
        threads = [threading.Thread(target=client, args=(range(k, 80, 8),)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
    assert results == {i: expected(ids, n) for i, (ids, n, _) in enumerate(work)}
    assert batcher.numbers().finished == 80 and engine.state == {} and 1 < max(engine.sizes) <= 8


def test_no_wake_up_is_lost():
    """Each request comes as the worker falls asleep: with one lost wake-up this would hang until its timeout."""
    with Batcher(Engine(), least=1, deadline_ms=60_000) as batcher:
        for i in range(300):
            assert batcher.submit([i % 80], 2).result(20) == expected([i % 80], 2)


def test_company_wakes_a_worker_that_waits_for_a_far_deadline():
    with Batcher(Engine(), least=2, deadline_ms=600_000) as batcher:
        a = batcher.submit([1], 3)
        with pytest.raises(TimeoutError, match=r"after 0\.05 s 0 tokens are there"):
            a.result(0.05)
        b = batcher.submit([2], 3)
        assert a.result(20) == expected([1], 3) and b.result(20) == expected([2], 3)
        assert a.queue_s >= 0.05


# ----------------------------------------------------------------------------------------------------------------- errors


def test_one_bad_request_does_not_end_the_others():
    engine = Engine()
    batcher, _ = by_hand(engine)

    def poisonous(logits, seen=[]):  # noqa: B006
        seen.append(1)
        return POISON if len(seen) == 3 else greedy(logits)

    def broken(logits):
        raise ArithmeticError("no such token")

    good = [batcher.submit([i], 8) for i in (1, 2)]
    bad = [batcher.submit([3, BAD_PROMPT], 8), batcher.submit([4], 8, poisonous), batcher.submit([5], 8, broken)]
    more = batcher.submit([6], 8)
    drain(batcher)
    assert [t.result(0) for t in (*good, more)] == [expected([i], 8) for i in (1, 2, 6)]
    for ticket, kind, words in zip(bad, (ValueError, RuntimeError, ArithmeticError), ("can't be read", "computed", "no such"), strict=True):
        with pytest.raises(kind, match=words):
            ticket.result(0)
        with pytest.raises(kind, match=words):
            list(ticket)
    assert bad[1].tokens == [*expected([4], 2), POISON]
    numbers = batcher.numbers()
    assert (numbers.finished, numbers.failed) == (3, 3) and engine.state == {}
    again = batcher.submit([7], 2)  # all slots can be used again
    batcher.submit([8], 2)
    drain(batcher)
    assert again.result(0) == expected([7], 2) and len(batcher._free) == 8


def test_an_engine_that_returns_too_few_rows_is_found_out():
    engine = Engine()
    whole = engine.step
    engine.step = lambda slots, tokens: whole(slots, tokens)[:1] if len(slots) == 1 else np.zeros((1, VOCAB))
    batcher, _ = by_hand(engine)
    a, b = batcher.submit([1], 3), batcher.submit([2], 3)
    drain(batcher)
    assert (a.result(0), b.result(0)) == (expected([1], 3), expected([2], 3))  # row by row it is right


def test_a_full_context_ends_the_request():
    engine = Engine()
    engine.context, engine.lengths = 6, [0] * 8
    admit, step = engine.admit, engine.step

    def count(slots, by):
        for s in slots:
            engine.lengths[s] += by
            assert engine.lengths[s] <= 6

    engine.admit = lambda slot, ids: (engine.lengths.__setitem__(slot, 0), count([slot], len(ids)), admit(slot, ids))[-1]
    engine.step = lambda slots, tokens: (count(slots, 1), step(slots, tokens))[-1]
    batcher, _ = by_hand(engine)
    a, b = batcher.submit([1, 2], 50), batcher.submit([3] * 6, 50)
    drain(batcher)
    assert a.result(0) == expected([1, 2], 5) and b.result(0) == expected([3] * 6, 1)


def test_logits_without_numbers_end_the_request():
    with pytest.raises(ValueError, match="the largest logit is nan"):
        greedy(np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="the largest logit is -inf"):
        greedy(np.full(4, -np.inf))


def test_a_slot_that_can_not_be_freed_is_not_used_again():
    engine = Engine(3)
    engine.state = {2: 99}  # somebody left something
    with Batcher(engine, least=1, most=3, deadline_ms=0) as batcher:
        engine.stuck = {0}
        first = batcher.submit([1], 2)
        with pytest.raises(OSError, match="slot 0 is stuck"):
            first.result(20)
        assert [batcher.submit([i], 2).result(20) for i in (2, 3)] == [expected([2], 2), expected([3], 2)]
        engine.stuck = {0, 1, 2}
        for _ in range(2):
            with pytest.raises(OSError, match="is stuck"):
                batcher.submit([4], 2).result(20)
        last = None
        with pytest.raises((RuntimeError, Closed), match="could not free any of its slots"):
            last = batcher.submit([5], 2)
            last.result(20)
        batcher._thread.join(20)
        with pytest.raises(Closed, match="the batcher's engine failed"):
            batcher.submit([6], 2)


# --------------------------------------------------------------------------------------------- cancelling, closing, limits


def test_cancelling():
    engine = Engine()
    batcher, _ = by_hand(engine, deadline_ms=1000)
    queued = batcher.submit([1], 5)
    assert queued.cancel() and not queued.done()
    assert batcher.turn() is None and queued.done() and not queued.cancel()
    with pytest.raises(CancelledError):
        queued.result(0)
    running, other = batcher.submit([2], 50), batcher.submit([3], 6)
    for _ in range(3):
        batcher.turn()
    running.cancel()
    drain(batcher)
    assert running.tokens == expected([2], 4) and other.result(0) == expected([3], 6)
    assert batcher.numbers().cancelled == 2 and engine.state == {}
    assert "ended by CancelledError" in repr(running) and "done" in repr(other)


def test_cancelling_wakes_the_worker():
    with Batcher(Engine(), deadline_ms=600_000) as batcher:
        ticket = batcher.submit([1], 5)
        ticket.cancel()
        with pytest.raises(CancelledError):
            ticket.result(20)


def test_a_reader_may_begin_late_or_twice():
    batcher, _ = by_hand(Engine(), least=1)
    ticket = batcher.submit([1], 5)
    batcher.turn()
    reader = iter(ticket)
    assert [next(reader), next(reader)] == expected([1], 2)
    drain(batcher)
    assert list(reader) == expected([1], 5)[2:] and list(ticket) == ticket.result(0) == expected([1], 5)


def test_too_many_waiting_are_refused():
    batcher, _ = by_hand(Engine(), waiting=3)
    tickets = [batcher.submit([i], 2) for i in range(3)]
    with pytest.raises(QueueFull, match="3 requests wait, and waiting=3; try again later"):
        batcher.submit([9], 2)
    drain(batcher)
    assert [t.result(0) for t in tickets] == [expected([i], 2) for i in range(3)] and batcher.numbers().refused == 1
    batcher.submit([9], 2).cancel()


def test_closing_finishes_what_is_there_or_cancels_it():
    with Batcher(Engine(), deadline_ms=600_000) as batcher:
        ticket = batcher.submit([1], 5)  # alone, far from its deadline: closing does not wait for it
    assert ticket.result(0) == expected([1], 5)
    with pytest.raises(Closed, match="was closed; make a new one"):
        batcher.submit([1])
    batcher.close()
    batcher = Batcher(Engine(), deadline_ms=600_000)
    ticket = batcher.submit([1], 5)
    batcher.close(cancel=True)
    with pytest.raises(CancelledError):
        ticket.result(0)
    with pytest.raises(KeyError), Batcher(Engine(), deadline_ms=600_000) as batcher:
        ticket = batcher.submit([1], 5)
        raise KeyError
    assert ticket.done() and not batcher._thread.is_alive()


def test_the_monitor_hears_of_all():
    monitor = Monitor()
    batcher, _ = by_hand(Engine(), monitor=monitor)
    for ids in ([1], [2, 3], [4, BAD_PROMPT]):
        batcher.submit(ids, 4)
    batcher.submit([5], 4).cancel()
    drain(batcher)
    c = monitor._c
    assert (c.requests, c.tokens, c.prompt_tokens) == (2, 8, 3) and c.errors == {"ValueError": 1, "CancelledError": 1}
    assert c.rows.n == batcher.numbers().steps == 3 and c.rows.total == 6
    assert c.first.n == 2 and c.token.n == 6 and c.queue.n == 3
    x = -np.abs(np.arange(VOCAB) - said(fold(17, 1))).astype(float)
    assert c.confidence.recent[0] == pytest.approx((np.exp(x) / np.exp(x).sum()).max())
    assert "rows per step, mean" in batcher.numbers()._repr_html_() and batcher.numbers().mean_batch == 2.0


@pytest.mark.slow
def test_the_runtime_says_the_same_together_as_alone():
    """The real engine: the phone model's tokens, each request by itself and in a batch that it joins late; drawn ones too."""
    from edgelab.runtime import Runtime, Sampler

    runtime = Runtime.open("data/edge-phone", threads=1, slots=4, context=64, tiles=None)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(5, 500, size=n).tolist() for n in (5, 9, 17, 3, 30, 8)]
    kinds = [(0.0, 1.0), (1.0, 0.9)]
    alone = [runtime.generate(p, 12, temperature=t, top_p=q, stop=(), seed=3).tokens for p in prompts for t, q in kinds]
    with Batcher(runtime, most=4, deadline_ms=5) as batcher:
        tickets = [batcher.submit(p, 12, Sampler(t, q, 3)) for p in prompts for t, q in kinds]
        together = [t.result(120) for t in tickets]
        full = batcher.submit(prompts[0], 500)
        assert len(full.result(120)) == 64 - 5 + 1  # the context ends it: one token for each position, and the last one's
    assert together == alone and max(batcher.numbers().batch_sizes) > 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Batcher(Engine(), 0), "least=0, most=8"),
        (lambda: Batcher(Engine(), 3, 2), "least=3, most=2"),
        (lambda: Batcher(Engine(4)), "most=8 is more than the engine's slots=4; give most=4"),
        (lambda: Batcher(Engine(), deadline_ms=-1), "deadline_ms=-1 must be 0"),
        (lambda: Batcher(Engine(), waiting=0), "waiting=0 must be 1"),
        (lambda: Batcher(Engine(), joins=0), "joins=0 must be 1"),
        (lambda: Batcher(Engine(), start=False).submit([]), "ids is empty"),
        (lambda: Batcher(Engine(), start=False).submit([1], 0), "max_new=0 must be 1"),
    ],
)
def test_wrong_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()
