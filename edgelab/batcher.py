"""A dynamic batcher: requests of several threads decode together, so that the weights are read once for all of them.

Decoding one token reads every weight that it uses; b requests in one step read the same weights once, so while memory is
the limit a step of b costs little more than a step of one. The price is waiting: for company, and for the slowest of the batch.

**When it starts.** From rest as soon as `least` requests are there, or when the oldest has waited `deadline_ms`, with what there is.
**Who joins.** Scheduling is by iteration (Yu et al., Orca, OSDI 2022, section 3): between two steps finished rows leave and waiting ones
take their slots, at most `most` in all. Reading a prompt holds up the rows that decode, so at most `joins` enter per step
while others run. An engine that can't take rows into a running batch says `continuous = False`: then a batch ends before the next begins.
**In which order.** First come, first served: nobody who came later is admitted earlier, so nobody starves.

An engine is anything with

    slots: int                                     rows that it holds at once, numbered 0 .. slots - 1
    admit(slot, ids) -> logits [vocab]             reads a prompt into a free slot
    step(slots, tokens) -> logits [len(slots), vocab]   a token each into these slots; raising leaves all of them as they were
    release(slot)                                  frees a slot; of a free one nothing happens

and is called from one thread at a time. Where it has `context` (positions per slot) and `lengths` (those filled, per slot), a
request whose slot is full ends with what it has. What it returns may be a buffer that it uses again: it is read before the next call.

An error in a prompt or in choosing a token ends that request alone. A step that raises is taken again row by row, so that the
row at fault is found; the others go on.
"""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgelab import html_table
from edgelab.monitor import Monitor
from edgelab.sampling import confidence, greedy


class Engine(Protocol):
    """See the module's docstring."""

    slots: int

    def admit(self, slot: int, ids: Sequence[int]) -> np.ndarray: ...
    def step(self, slots: list[int], tokens: list[int]) -> np.ndarray: ...
    def release(self, slot: int) -> None: ...


class QueueFull(RuntimeError):
    """Too many requests wait: try again later, or give the batcher a larger `waiting`."""


class Closed(RuntimeError):
    """The batcher takes no more requests."""


class Ticket:
    """A request in the batcher's hands: iterate over its tokens as they come, or wait for all with `result()`."""

    def __init__(
        self, ids: list[int], max_new: int, sample: Callable[[np.ndarray], int], stop: frozenset[int], came: float, wake: Callable[[], None]
    ) -> None:
        self.ids, self.max_new, self.stop = ids, max_new, stop
        self.tokens: list[int] = []
        self.queue_s = math.nan  # until it is admitted
        self._sample, self._came, self._at, self._wake = sample, came, came, wake
        self._seconds: list[float] = []  # of each token, the first from when it came
        self._confidences: list[float] = []
        self._changed = threading.Condition()  # wakes readers at each token
        self._ended = threading.Event()  # wakes once
        self._error: BaseException | None = None
        self._done = self._cancelled = False

    def cancel(self) -> bool:
        """Asks for an end, which comes before the next step; False if it has ended already. Tokens so far stay in `tokens`."""
        with self._changed:
            if self._done:
                return False
            self._cancelled = True
        self._wake()
        return True

    def done(self) -> bool:
        return self._done

    def result(self, timeout: float | None = None) -> list[int]:
        """All tokens, the one that stopped it not among them. Raises what ended it: its error, CancelledError, TimeoutError."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"after {timeout:g} s {len(self.tokens)} tokens are there and more to come")
        if self._error is not None:
            raise self._error
        return list(self.tokens)

    def __iter__(self) -> Iterator[int]:
        """The tokens as they come, from the first; ends as `result` does."""
        given = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda n=given: self._done or len(self.tokens) > n)
                new = self.tokens[given:]
                if not new:
                    if self._error is not None:
                        raise self._error
                    return
            yield from new
            given += len(new)

    def _take(self, token: int) -> None:
        with self._changed:
            self.tokens.append(token)
            self._changed.notify_all()

    def _end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._done, self._error = True, error
            self._changed.notify_all()
        self._ended.set()

    def __repr__(self) -> str:
        state = "running" if not self._done else "done" if self._error is None else f"ended by {type(self._error).__name__}"
        return f"Ticket({len(self.ids)} prompt tokens, {len(self.tokens)} of {self.max_new} tokens, {state})"


@dataclass(frozen=True)
class Numbers:
    """What the batcher counted: requests by how they ended, steps, rows per step {rows: steps}, seconds that requests queued."""

    finished: int
    failed: int
    cancelled: int
    refused: int
    waiting: int
    running: int
    steps: int
    tokens: int
    batch_sizes: dict[int, int]
    queue_s: tuple[float, ...] = field(repr=False, default=())  # of the latest 1,024

    @property
    def mean_batch(self) -> float:
        """Rows per step on average: how often each reading of the weights was shared."""
        return sum(k * n for k, n in self.batch_sizes.items()) / self.steps if self.steps else math.nan

    def _repr_html_(self) -> str:
        waits = sorted(self.queue_s) or [math.nan]
        rows = {name: f"{getattr(self, name):,}" for name in ("finished", "failed", "cancelled", "refused", "waiting", "running", "tokens")}
        rows |= {"rows per step, mean": f"{self.mean_batch:.2f}", "queued, median": f"{1e3 * waits[len(waits) // 2]:.1f} ms"}
        return html_table.facts(rows)


class Batcher:
    """Takes requests from any thread and runs them on `engine` together; `with Batcher(engine) as b: b.submit(ids).result()`.

    `waiting` is how many may wait before `submit` refuses. With `start=False` no thread is started and `turn` is the caller's to
    call, with a `clock` of the caller's: how the tests drive it.
    """

    def __init__(
        self,
        engine: Engine,
        least: int = 2,
        most: int = 8,
        deadline_ms: float = 20.0,
        *,
        waiting: int = 64,
        joins: int = 1,
        monitor: Monitor | None = None,
        clock: Callable[[], float] = time.monotonic,
        start: bool = True,
    ) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"least={least}, most={most}: give 1 <= least <= most")
        if most > engine.slots:
            raise ValueError(f"most={most} is more than the engine's slots={engine.slots}; give most={engine.slots}, or a larger engine")
        if not deadline_ms >= 0:
            raise ValueError(f"deadline_ms={deadline_ms} must be 0 or more")
        for name, value in (("waiting", waiting), ("joins", joins)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.engine, self.least, self.most, self.deadline_s = engine, least, most, deadline_ms / 1000
        self.max_waiting, self.joins, self.monitor = waiting, joins, monitor
        self._clock = clock
        self._queue: deque[Ticket] = deque()
        self._rows: dict[int, Ticket] = {}  # slot -> who runs in it, in the order of admission
        self._free = list(range(most))[::-1]
        for slot in self._free:  # whatever ran in them before
            engine.release(slot)
        if hasattr(engine, "held_by"):  # a runtime then refuses to generate on the side
            engine.held_by = "a Batcher"
        self._lock = threading.Condition()
        self._closing, self._broken, self._news = False, None, 0
        self._count: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._waits: deque[float] = deque(maxlen=1024)
        self._thread = threading.Thread(target=self._work, name="edgelab-batcher", daemon=True) if start else None
        if self._thread:
            self._thread.start()

    # ------------------------------------------------------------------------------------------------- from outside

    def submit(
        self, ids: Sequence[int], max_new: int = 64, sample: Callable[[np.ndarray], int] = greedy, stop: Sequence[int] = ()
    ) -> Ticket:
        """A `Ticket` for the prompt `ids`. `sample`: logits [vocab] -> token, called for this request alone, in order.

        Raises QueueFull when too many wait, Closed after `close`, ValueError for an empty prompt.
        """
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("ids is empty; give at least one token, such as the one that begins a document")
        if max_new < 1:
            raise ValueError(f"max_new={max_new} must be 1 or more")
        with self._lock:
            if self._broken is not None:
                raise Closed(f"the batcher's engine failed: {self._broken!r}") from self._broken
            if self._closing:
                raise Closed("the batcher was closed; make a new one")
            if len(self._queue) >= self.max_waiting:
                self._count["refused"] += 1
                raise QueueFull(f"{len(self._queue)} requests wait, and waiting={self.max_waiting}; try again later")
            ticket = Ticket(ids, int(max_new), sample, frozenset(int(s) for s in stop), self._clock(), self._wake)
            self._queue.append(ticket)
        self._wake()
        return ticket

    def numbers(self) -> Numbers:
        """The `Numbers` so far."""
        with self._lock:
            counts = [self._count[k] for k in ("finished", "failed", "cancelled", "refused")]
            sizes = dict(sorted(self._sizes.items()))
            live = (len(self._queue), len(self._rows), self._count["steps"], self._count["tokens"])
            return Numbers(*counts, *live, sizes, tuple(self._waits))

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests; those there are finished first, or cancelled. Returns when all have ended. Again: nothing."""
        with self._lock:
            self._closing = True
            tickets = [*self._queue, *self._rows.values()]
        for t in tickets if cancel else ():
            t.cancel()
        self._wake()
        if self._thread is None:
            while self._queue or self._rows:
                self.turn()
        else:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"after {timeout:g} s requests are still running; close(cancel=True) ends them")
        if hasattr(self.engine, "held_by"):
            self.engine.held_by = ""

    def _wake(self) -> None:
        with self._lock:
            self._news += 1
            self._lock.notify_all()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, kind: type | None, *rest: Any) -> None:
        self.close(cancel=kind is not None)

    # --------------------------------------------------------------------------------------------- the worker's side

    def turn(self) -> float | None:
        """One round: drop the cancelled, admit who may enter, take a step. Returns the seconds until there may be more to do:
        0 while rows run, the rest of a deadline, None when nothing waits."""
        for slot in [s for s, t in self._rows.items() if t._cancelled]:
            self._leave(slot, CancelledError(), "cancelled")
        entering, wait = self._entering()
        for ticket in entering:
            self._admit(ticket)
        if self._rows:
            self._step()
            return 0.0
        return 0.0 if entering else wait

    def _entering(self) -> tuple[list[Ticket], float | None]:
        """(who is admitted now, seconds until the deadline of the oldest; None when nobody waits)."""
        with self._lock:
            for t in [t for t in self._queue if t._cancelled]:
                self._queue.remove(t)
                self._ended(t, CancelledError(), "cancelled")
            if not self._queue:
                return [], None
            now, running = self._clock(), len(self._rows)
            if running:
                room = self.joins if getattr(self.engine, "continuous", True) else 0
                left = 0.0
            else:
                left = self._queue[0]._came + self.deadline_s - now
                ready = len(self._queue) >= self.least or left <= 0 or self._closing
                room = len(self._free) if ready else 0
                if not self._free:
                    raise RuntimeError("the engine could not free any of its slots")
            return [self._queue.popleft() for _ in range(min(room, len(self._queue), len(self._free)))], max(0.0, left)

    def _admit(self, ticket: Ticket) -> None:
        slot, began = self._free.pop(), self._clock()
        ticket.queue_s = began - ticket._came
        with self._lock:
            self._waits.append(ticket.queue_s)
            self._rows[slot] = ticket
        if self.monitor is not None:
            self.monitor.queued(ticket.queue_s)
        try:
            logits = self.engine.admit(slot, ticket.ids)
        except Exception as error:
            self._leave(slot, error, "failed")
            return
        self._choose(slot, logits)

    def _step(self) -> None:
        slots = list(self._rows)
        try:
            logits = self.engine.step(slots, [self._rows[s].tokens[-1] for s in slots])
            if len(logits) != len(slots):
                raise RuntimeError(f"the engine gave {len(logits)} rows of logits for {len(slots)} slots")
        except Exception as error:
            if len(slots) == 1:
                self._leave(slots[0], error, "failed")
                return
            for s in slots:  # who is at fault? each alone: the engine promises that a failed step changed nothing
                self._alone(s)
            return
        self._counted(len(slots))
        for s, row in zip(slots, logits, strict=True):
            self._choose(s, row)

    def _alone(self, slot: int) -> None:
        try:
            (row,) = self.engine.step([slot], [self._rows[slot].tokens[-1]])
        except Exception as error:
            self._leave(slot, error, "failed")
            return
        self._counted(1)
        self._choose(slot, row)

    def _counted(self, rows: int) -> None:
        with self._lock:
            self._count["steps"] += 1
            self._sizes[rows] += 1
        if self.monitor is not None:
            self.monitor.stepped(rows)

    def _choose(self, slot: int, logits: np.ndarray) -> None:
        """Lets the request in `slot` choose its next token from `logits` [vocab], and leave where that was the last."""
        ticket = self._rows[slot]
        try:
            token = int(ticket._sample(logits))
            p = confidence(logits, token) if self.monitor is not None else math.nan
        except Exception as error:
            self._leave(slot, error, "failed")
            return
        now = self._clock()
        ticket._seconds.append(now - ticket._at)
        ticket._confidences.append(p)
        ticket._at = now
        if token in ticket.stop:
            self._leave(slot, None, "finished")
            return
        with self._lock:
            self._count["tokens"] += 1
        ticket._take(token)
        lengths = getattr(self.engine, "lengths", None)
        if len(ticket.tokens) >= ticket.max_new or (lengths is not None and lengths[slot] >= self.engine.context):
            self._leave(slot, None, "finished")

    def _leave(self, slot: int, error: BaseException | None, how: str) -> None:
        with self._lock:
            ticket = self._rows.pop(slot)
        try:
            self.engine.release(slot)
        except Exception as broken:
            if error is None:
                error, how = broken, "failed"
            # a slot that can't be freed is not used again
        else:
            self._free.append(slot)
        self._ended(ticket, error, how)

    def _ended(self, ticket: Ticket, error: BaseException | None, how: str) -> None:
        with self._lock:
            self._count[how] += 1
        if self.monitor is not None:
            if how == "finished":
                self.monitor.observe(ticket._seconds, ticket._confidences, prompt_tokens=len(ticket.ids), new_tokens=len(ticket.tokens))
            else:
                self.monitor.failed(error)
        ticket._end(error)

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    news = self._news
                wait = self.turn()
                with self._lock:
                    if self._closing and not self._queue and not self._rows:
                        return
                    if wait is None or wait > 0:  # what came during the turn is news already
                        self._lock.wait_for(lambda seen=news: self._news != seen, wait)
        except BaseException as error:  # ours, or an engine beyond repair: nobody may wait for ever
            with self._lock:
                self._broken = error
                tickets = [*self._queue, *self._rows.values()]
                self._queue.clear()
                self._rows.clear()
            for t in tickets:
                t._end(error)
