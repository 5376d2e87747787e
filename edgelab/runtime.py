"""Generate from a bundle on the project's own kernels: no torch between the first token and the last.

    rt = Runtime.open("runs/demo/int4", threads=2)
    rt.generate(ids, max_new=64)            greedy; temperature=0.8, top_p=0.95, seed=1 to sample
    for token in rt.stream(ids): ...        one after the other
    rt.plan                                 what lies where, before and after planning
    Runtime.open(..., slots=8)              several sequences at once: `admit`, `step`, `release` (`batcher.py`)

Prompts go through the matrix kernels `chunk` rows at a time, each new token through one call of the program (`decoder.py`,
`kernels/decode.py`). Two switches trade exactness for speed. `activations`: "int8" rounds the inputs of every product to int8, per
group of the weight, as llama.cpp does (and is the fastest); "float32" multiplies the weights' own values, and gives transformers'
greedy tokens on the dequantized weights. `kv`: the cache as "float16" or "float32".
"""

import hashlib
import json
import operator
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelab import html_table
from edgelab.kernels import decode, pool, simd
from edgelab.kernels._jit import ONE_AT_A_TIME
from edgelab.kernels._jit import threads as kernel_threads
from edgelab.kernels.matmul import ACTIVATIONS
from edgelab.sampling import Sampler, confidence

MANIFEST = "edgelab.json"


@dataclass(frozen=True)
class Generation:
    """What `generate` returns. `confidences`: the probability of each chosen token. `finish`: "stop", "length" or "context"."""

    tokens: list[int]
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int
    confidences: list[float]
    finish: str

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s else float("nan")

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the steps after the prompt, whose last position gave the first token; a token that ended the answer took a step too."""
        return self.decode_steps / self.decode_s if self.decode_s else float("nan")

    def _rows(self) -> list[tuple[str, str]]:
        mean = sum(self.confidences) / len(self.confidences) if self.confidences else float("nan")
        return [
            ("prompt", f"{self.prompt_tokens} tokens in {self.prefill_s:.3f} s ({self.prefill_tokens_per_s:,.0f} tokens/s)"),
            ("answer", f"{len(self.tokens)} tokens, {self.decode_tokens_per_s:,.1f} tokens/s"),
            ("mean probability of a chosen token", f"{mean:.3f}"),
            ("ended by", self.finish),
        ]

    def __repr__(self) -> str:
        return "Generation: " + "; ".join(f"{name} {value}" for name, value in self._rows())

    def _repr_html_(self) -> str:
        return html_table.facts(self._rows())


class Runtime:
    """A model ready to generate. `Runtime(model)` takes a quantized transformers model in memory, `Runtime.open` a folder.

    `context`: positions per sequence (None: the model's, 1,024 at most); `slots`: sequences at once; `chunk`: rows of a prompt that go
    together; `threads`: None for `edgelab.set_threads`' number. `reuse` False gives every buffer memory of its own, to see what planning
    saves.

    Attributes to read: `plan` (a `MemoryPlan`), `experts`, `vocabulary`, `lengths` (positions filled, per slot). To set between tokens:
    `threads` and `top_k` (experts per token; the model's number or fewer).

    One caller at a time: a second thread, or a stream whose slot another sequence took meanwhile, gets a RuntimeError. Raises ValueError
    for a model that it would compute differently from transformers, with the reason. It can't be pickled or copied: it holds addresses.
    """

    def __reduce__(self):
        raise TypeError("a Runtime can't be pickled or copied, for it holds addresses: open the folder again with Runtime.open")

    def __init__(
        self,
        model,
        *,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        chunk: int = 128,
        activations: str = "int8",
        kv: str | None = None,
        reuse: bool = True,
        _store=None,
        _fill=None,
        _release=None,
    ) -> None:
        from edgelab.decoder import assemble
        from edgelab.program import Settings
        from edgelab.tile_store import TileStore

        if context is None:
            context = min(1024, getattr(model.config, "max_position_embeddings", None) or 1024)
        kv = kv or ("float32" if simd.way() == "portable" else "float16")
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations={activations!r} is not known; use one of {', '.join(ACTIVATIONS)}")
        if kv not in decode.KV:
            raise ValueError(f"kv={kv!r} is not known; use one of {', '.join(decode.KV)}")
        if kv == "float16" and simd.way() == "portable":
            raise ValueError("kv='float16' needs a processor that converts it (F16C, or Arm's); use kv='float32'")
        for name, value in (("context", context), ("slots", slots), ("chunk", chunk)):
            if operator.index(value) < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self._most_threads = _threads(threads)
        settings = Settings(context, slots, min(chunk, context), activations == "int8", kv == "float16", self._most_threads, reuse)
        none = lambda _: None  # noqa: E731
        store = _store if _store is not None else TileStore()
        self._program = p = assemble(model, settings, store, _fill or none, _release or none)
        self.context, self.slots, self.chunk, self.activations, self.kv = context, slots, settings.chunk, activations, kv
        self.plan, self.vocabulary, self.experts = p.plan, p.vocabulary, p.experts
        self.eos = _eos(model)
        self.threads = self._most_threads
        self.lengths = [0] * slots
        self.held_by = ""  # who has the slots for a time (a batcher): `generate` and `stream` then refuse
        self._sequences = [0] * slots  # how many began in each slot
        self._busy = threading.Lock()
        rows = settings.rows
        self._tokens, self._positions, self._slots_of = (np.zeros(rows, np.int64) for _ in range(3))
        self._wanted = np.zeros(rows, np.int64)
        for word, array in (
            (decode.TOKENS, self._tokens),
            (decode.POSITIONS, self._positions),
            (decode.SLOTS_AT, self._slots_of),
            (decode.WANTED_AT, self._wanted),
        ):
            p.record[word] = array.ctypes.data

    @classmethod
    def open(cls, folder: str | Path, *, tiles: str | Path | None = "cache", verify: bool = False, **settings) -> "Runtime":
        """The runtime of a bundle (or a checkpoint that transformers reads), its weights mapped.

        `tiles`: "cache" keeps the weights in the kernels' order in the user's cache (`tile_store.cache_folder`) and maps them from
        there; a path names the file; None lays them out in memory. `verify` reads the whole file first and compares its sums. Other
        settings as the class takes them. Raises FileNotFoundError or ValueError.
        """
        from edgelab.lazy import LazyBundle
        from edgelab.tile_store import TileStore, cache_folder

        bundle = LazyBundle(folder)
        file, key = None, ""
        if tiles is not None:
            key = _key(bundle)
            file = Path(tiles) if tiles != "cache" else cache_folder() / f"{key[:32]}.safetensors"

        def fill(name: str) -> None:
            if name in bundle.units:
                bundle.fill(name)

        def release(name: str) -> None:
            if name in bundle.units:
                bundle.release(name)

        store = TileStore(file, key)
        if verify:
            store.check()
        runtime = cls(bundle.model, **settings, _store=store, _fill=fill, _release=release)
        if file is not None and not store.found:
            store.save()
            again = TileStore(file, key)
            if again.found:  # from here on the pages of the file, not ours
                runtime = store = None
                runtime = cls(bundle.model, **settings, _store=again, _fill=fill, _release=release)
                _give_back()
        runtime._bundle = bundle  # what is mapped stays mapped
        runtime.folder = Path(folder)
        return runtime

    def __repr__(self) -> str:
        p = self._program
        experts = f", {self.experts} experts of which {self.top_k} are used" if self.experts else ""
        return (
            f"Runtime({p.layers} layers{experts}; {self.slots} x {self.context} positions, activations {self.activations}, "
            f"cache {self.kv}, {self.threads} threads; {p.plan.weight_bytes + p.plan.planned_bytes + p.plan.cache_bytes:,} bytes)"
        )

    # ------------------------------------------------------------------------------------------------------------ settings
    @property
    def threads(self) -> int:
        """Threads that share the work; up to the number that the runtime was opened with."""
        return self._threads

    @threads.setter
    def threads(self, n: int) -> None:
        if not 1 <= operator.index(n) <= self._most_threads:
            raise ValueError(f"threads={n}; this runtime was opened for 1 .. {self._most_threads}")
        self._threads = n

    @property
    def top_k(self) -> int | None:
        """Experts per token; None for a model without experts."""
        return int(self._program.top_k[0]) if self.experts else None

    @top_k.setter
    def top_k(self, k: int | None) -> None:
        most = self._program.most_k
        k = most if k is None else operator.index(k)
        if not self.experts:
            raise ValueError("top_k: this model has no experts")
        if not 1 <= k <= most:
            raise ValueError(f"top_k={k}; the model uses {most} experts per token: 1 .. {most}")
        self._program.top_k[0] = k
        for plan in self._program.gates:
            plan[3] = k

    # ---------------------------------------------------------------------------------------------------------- the engine
    def admit(self, slot: int, ids: Sequence[int], progress: bool = False) -> np.ndarray:
        """Logits float32 [vocabulary] behind the last of `ids`, which go on where the slot's sequence ends (an empty one begins).

        Raises ValueError for a slot or a token that does not exist, and where the context is too short, before anything is computed.
        """
        ids = self._checked(slot, ids)
        with self._alone():
            self._prompt(slot, ids, progress)
            return self._head(np.array([(len(ids) - 1) % self.chunk]))[0].copy()

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [len(slots), vocabulary] after one more token for each of the (different) slots.

        A view: the next call overwrites it.
        """
        try:
            slots, tokens = [operator.index(s) for s in slots], [operator.index(t) for t in tokens]
        except TypeError:
            raise ValueError(f"slots {slots!r} and tokens {tokens!r} must be lists of whole numbers") from None
        n = len(slots)
        if n != len(tokens) or not n or len(set(slots)) != n:
            raise ValueError(f"slots {list(slots)} and tokens {list(tokens)} must be as many, at least one, and no slot twice")
        for slot, token in zip(slots, tokens, strict=True):
            if not 0 <= slot < self.slots:
                raise ValueError(f"slot {slot}; this runtime has 0 .. {self.slots - 1}")
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"token {token} is outside the vocabulary, 0 .. {self.vocabulary - 1}")
            if self.lengths[slot] >= self.context:
                raise ValueError(f"slot {slot} is full: {self.context} positions; open the runtime with a longer context")
        with self._alone():
            for i, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
                self._tokens[i], self._slots_of[i], self._positions[i] = token, slot, self.lengths[slot]
            self._run(n, 1)
            for slot in slots:
                self.lengths[slot] += 1
            most = self._program.wanted
            if n <= most:
                return self._head(np.arange(n))
            return np.concatenate([self._head(np.arange(i, min(i + most, n))).copy() for i in range(0, n, most)])

    @contextmanager
    def _alone(self):
        """The buffers are one caller's at a time."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another thread is using this runtime: wait for it, open another, or let a Batcher share it")
        try:
            yield
        finally:
            self._busy.release()

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}; this runtime has 0 .. {self.slots - 1}")
        self.lengths[slot] = 0
        self._sequences[slot] += 1

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits float32 [len(ids), vocabulary] of every position of a text, in slot 0, which is empty afterwards."""
        ids = self._checked(0, ids, fresh=True)
        self.release(0)
        found = np.empty((len(ids), self.vocabulary), np.float32)
        most = self._program.wanted
        with self._alone():
            for start in range(0, len(ids), self.chunk):
                part = ids[start : start + self.chunk]
                self._rows(0, part)
                for i in range(0, len(part), most):
                    rows = np.arange(i, min(i + most, len(part)))
                    found[start + rows] = self._head(rows)
        self.release(0)
        return found

    def _checked(self, slot: int, ids: Sequence[int], fresh: bool = False) -> np.ndarray:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}; this runtime has 0 .. {self.slots - 1}")
        found = np.asarray(ids)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
            raise ValueError(f"ids are {found.dtype} {found.shape}; give a list of at least one token number")
        if found.min() < 0 or found.max() >= self.vocabulary:
            raise ValueError(f"ids hold {found.min()} .. {found.max()}; the vocabulary is 0 .. {self.vocabulary - 1}")
        room = self.context - (0 if fresh else self.lengths[slot])
        if found.size > room:
            raise ValueError(
                f"{found.size} tokens do not fit: {room} of the context of {self.context} are free; open with a longer context"
            )
        return found.astype(np.int64)

    def _prompt(self, slot: int, ids: np.ndarray, progress: bool) -> None:
        starts = range(0, len(ids), self.chunk)
        if progress:
            from tqdm.auto import tqdm

            starts = tqdm(starts, desc="read the prompt", unit="chunk", leave=False)
        for start in starts:
            self._rows(slot, ids[start : start + self.chunk])

    def _rows(self, slot: int, ids: np.ndarray) -> None:
        n, at = len(ids), self.lengths[slot]
        self._tokens[:n], self._slots_of[:n], self._positions[:n] = ids, slot, np.arange(at, at + n)
        self._run(n, n)
        self.lengths[slot] = at + n

    def _run(self, rows: int, run: int) -> None:
        p = self._program
        p.record[decode.ROWS], p.record[decode.RUN] = rows, run
        self._call(p.body, p.body_rows, rows)

    def _head(self, rows: np.ndarray) -> np.ndarray:
        """Logits of those rows of the last step, a view."""
        p, n = self._program, len(rows)
        self._wanted[:n] = rows
        p.record[decode.WANTED] = n
        self._call(p.head, p.head_rows, n)
        return p.logits[:n]

    def _call(self, program: np.ndarray, rows_of: np.ndarray, rows: int) -> None:
        workers = self._threads - 1
        many = rows >= 16
        # few rows read as fast as memory gives, better in long runs: two parts a thread were 3 to 6 % faster than four (AMD EPYC)
        parts = pool.parts_of(workers) if many else min(pool.parts_of(workers), 2 * self._threads)
        with ONE_AT_A_TIME:
            decode.run(program, rows_of, rows, pool.ready(workers), parts, workers, many)

    # ---------------------------------------------------------------------------------------------------------- generation
    def generate(
        self,
        ids: Sequence[int],
        max_new: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Up to `max_new` tokens behind the prompt `ids`. `stop`: tokens that end it (None: the model's end token); they are not returned.

        Slot 0 is used, from its beginning. A prompt that fills the context gives one token.
        """
        steps = list(self._steps(ids, max_new, Sampler(temperature, top_p, seed), self._stops(stop)))
        kept = [s for s in steps if s[3] != "stop"]
        return Generation(
            [s[0] for s in kept], len(ids), steps[0][2], sum(s[2] for s in steps[1:]), len(steps) - 1, [s[1] for s in kept], steps[-1][3]
        )

    def stream(self, ids: Sequence[int], max_new: int = 64, *, temperature=0.0, top_p=1.0, stop=None, seed=None) -> Iterator[int]:
        """The tokens of `generate`, each as soon as it is there; `confidence` then is that token's probability.

        What is wrong with the arguments is said at once; the prompt is read when the first token is asked for.
        """
        steps = self._steps(ids, max_new, Sampler(temperature, top_p, seed), self._stops(stop))

        def tokens() -> Iterator[int]:
            for token, chosen, _, finish in steps:
                self.confidence = chosen
                if finish != "stop":
                    yield token

        return tokens()

    def _stops(self, stop: Sequence[int] | None) -> frozenset[int]:
        return frozenset(self.eos if stop is None else map(operator.index, stop))

    confidence = float("nan")  # the probability that the model gave the token that `stream` chose last

    def _steps(self, ids, max_new: int, sampler: Sampler, stops: frozenset[int]) -> Iterator[tuple[int, float, float, str]]:
        """(token, its probability, seconds, why it is the last or "") one after the other."""
        if operator.index(max_new) < 1:
            raise ValueError(f"max_new={max_new} must be 1 or more")
        if self.held_by:
            raise RuntimeError(f"{self.held_by} has this runtime's slots: ask it, or open another runtime")
        self._checked(0, ids, fresh=True)
        return self._taken(ids, max_new, sampler, stops)

    def _taken(self, ids, max_new: int, sampler: Sampler, stops: frozenset[int]) -> Iterator[tuple[int, float, float, str]]:
        self.release(0)
        mine, start = self._sequences[0], time.perf_counter()
        logits = self.admit(0, ids)
        for i in range(max_new):
            token = sampler(logits)
            chosen = confidence(logits, token)
            full = self.lengths[0] >= self.context
            finish = "stop" if token in stops else "length" if i + 1 == max_new else "context" if full else ""
            now = time.perf_counter()
            yield token, chosen, now - start, finish
            if finish:
                return
            if self._sequences[0] != mine:
                raise RuntimeError("another sequence began in slot 0 while this one was read: one generation at a time on a runtime")
            start = time.perf_counter()
            logits = self.step((0,), (token,))[0]


def _give_back() -> None:
    """Hand freed memory back to the system: what was laid out lies in a file now."""
    import ctypes
    import gc

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def generate(folder: str | Path, ids: Sequence[int], max_new: int = 64, **settings) -> Generation:
    """`Runtime.open(folder)`, then `generate`: for a single answer. `settings` of either."""
    own = {k: settings.pop(k) for k in ("temperature", "top_p", "stop", "seed") if k in settings}
    return Runtime.open(folder, **settings).generate(ids, max_new, **own)


def _threads(threads: int | None) -> int:
    most = kernel_threads()
    threads = most if threads is None else operator.index(threads)
    import numba

    if not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(f"threads={threads}; this machine runs 1 .. {numba.config.NUMBA_NUM_THREADS} (NUMBA_NUM_THREADS raises it)")
    return threads


def _eos(model) -> tuple[int, ...]:
    settings = getattr(model, "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    eos = getattr(model.config, "eos_token_id", None) if eos is None else eos
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _key(bundle) -> str:
    """What the tiles of a folder depend on: its files with sizes and times, and the digests that a manifest states."""
    files = {s.file for s in bundle.tensors.values()} | {bundle.path / "config.json"}
    facts: dict = {str(f.resolve()): (f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ino) for f in files}
    if bundle.manifest is not None:
        facts |= {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
