"""The capstone: make a model fit a device's memory and speed; among those that fit, the best exact match wins. Scored locally.

**The device is scaled.** The embedded models have a few million weights, and every device in data/devices.toml holds them a hundred
times over. So a `Challenge` divides what the device has (memory, bandwidth, operations per second) by `scale`, 168 unless given: the 1.24
billion weights of Llama-3.2-1B over the 7.37 million of our mixture. A Redmi 6A, which gives an app 500 MB and reads 7.5 GB/s, becomes
2.98 MB and 44 MB/s; what our model takes of that is what a model of a billion weights takes of the phone. Two budgets:

    memory     bytes of the weights' files + keys and values of `context` tokens + working memory   <=  usable bytes / scale
    latency    time of one token by the roofline of `device.predict`, as if all of it lay in memory  <=  `ms_per_token`

Memory is counted, latency is modelled: its band is a factor of two either way, and the budget is held against its middle, the same for all.

**What is scored.** Every submission is written to disk as a bundle, read back, audited, and answers questions that nobody can have
learnt by heart: assistant's commands from the corpus' own generator with another seed, without those that the corpus holds in any split;
and sums of the test split, drawn by the seed (the corpus holds *all* sums of two-digit numbers, so there is no fresh one). The score is the
mean of the two shares of right answers, each with its 95 % bootstrap interval over the items, domain by domain.

**Ties.** All entries of a board answered the same items, so two are compared item by item (paired bootstrap). The one below shares the
rank of the one above unless the difference is significant: a board that tells 95.1 from 94.9 % on 200 items tells noise.

**What is refused, and what can't be.** Refused: files changed after they were written, a bundle whose coverage is not what its tensors are,
calibration or training text that holds an item, word for word. What scores is what was read back from disk, so a model in memory can't
bring code of its own. Not to be seen from outside: weights that were trained on the test split, or on its questions in other words. There
honour begins, and `rescore` helps: after the deadline someone else names a seed, and every entry answers new questions. It also undoes
tuning to the board by many submissions, and it refuses weights that were exchanged since they were submitted.

**What a board is not.** `board.json` is a plain file, and nothing tells that somebody edited it: a checksum in it could be edited as well.
Answers that were invented there are gone after `rescore`, which reads of an entry only its name, its folder and the hash of its weights.
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from edgelab import data, html_table
from edgelab.device import DeviceProfile, Prediction, Quantity, device, engineering, predict
from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.report import machine
from edgelab.shape import ModelShape, from_folder

DOMAINS = data.SCORED
MODELS = ("edge-moe", "edge-dense")  # what a recipe may start from
_SCALED = ("dram_bytes_per_s", "memory_bytes", "usable_bytes", "flash_bytes_per_s", "cpu_int8_ops_per_s")
_ANSWERS = ("config.json", "model.safetensors.index.json")  # beside the weights' files: what decides how they answer
_RESAMPLES = 2000
_CORPUS_SEED = 0  # of the commands in the corpus
_DRAWN = 400_000  # commands drawn at most in search of fresh ones: more than there are different ones to be had in practice
_LOCK_S, _STALE_S = 20.0, 60.0
Stage = Callable[[str], None]


@dataclass(frozen=True)
class Challenge:
    """The device, its scale, the two budgets, and the items. See the module for what they mean.

    `context`, `prompt`: tokens in the cache, and tokens read at once (they set cache and working memory). `assistant`, `arithmetic`:
    how many items of each; `seed` draws them, and is not the corpus' own, 0. Raises ValueError for what makes no sense.

    >>> Challenge().memory_bytes, Challenge().ms_per_token
    (2976190, 50.0)
    """

    device: str = "redmi-6a"
    scale: float = 168.0
    ms_per_token: float = 50.0
    context: int = 256
    prompt: int = 32
    assistant: int = 150
    arithmetic: int = 150
    seed: int = 12

    def __post_init__(self) -> None:
        if device(self.device).usable_bytes is None:
            raise ValueError(f"device={self.device!r} does not say how many bytes an app may take (usable_bytes); choose one that does")
        for name in ("scale", "ms_per_token", "context", "prompt", "assistant", "arithmetic"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0")
        if self.seed == _CORPUS_SEED:
            raise ValueError(f"seed={self.seed} made the corpus' own commands: they would be no fresh ones; use another")

    @property
    def memory_bytes(self) -> int:
        return int(device(self.device).usable_bytes.value / self.scale)

    @property
    def profile(self) -> DeviceProfile:
        """The scaled device. Its numbers say that they were divided."""
        whole = device(self.device)

        def scaled(q: Quantity | None) -> Quantity | None:
            return None if q is None else Quantity(q.value / self.scale, q.unit, f"{q.source}; divided by {self.scale:g}", "derived")

        return replace(whole, name=f"{whole.name}/{self.scale:g}", **{name: scaled(getattr(whole, name)) for name in _SCALED})

    def predict(self, shape: ModelShape) -> Prediction:
        """What the scaled device would do, modelled, as if the whole model lay in its memory."""
        return predict(replace(self.profile, usable_bytes=None), shape, context=self.context, prompt=self.prompt)

    def needs(self, shape: ModelShape, weight_bytes: float | None = None) -> float:
        """Bytes in memory: weights (those of the shape unless given), keys and values, working memory."""
        weights = shape.weight_bytes if weight_bytes is None else weight_bytes
        return weights + shape.kv_bytes(self.context) + shape.activation_bytes(self.prompt)

    def why_not(self, memory: float, ms: float) -> tuple[str, ...]:
        """The budgets that are broken, in words; empty for what fits."""
        wrong = []
        if memory > self.memory_bytes:
            wrong.append(f"it needs {memory / 1e6:.2f} MB of memory and there are {self.memory_bytes / 1e6:.2f}")
        if ms > self.ms_per_token:
            wrong.append(f"a token takes {ms:.1f} ms (modelled) and may take {self.ms_per_token:g}")
        return tuple(wrong)

    def say(self) -> str:
        """The task in two sentences."""
        whole = device(self.device)
        return (
            f"{whole.title} at 1/{self.scale:g}: {self.memory_bytes / 1e6:.2f} MB of memory (an app gets "
            f"{engineering(whole.usable_bytes.value, 'B')}, {whole.usable_bytes.how}) for weights, the cache of {self.context} tokens and "
            f"working memory; {self.ms_per_token:g} ms per token (modelled). The best exact match on {self.assistant} fresh commands and "
            f"{self.arithmetic} held-out sums wins."
        )


# ------------------------------------------------------------------------------------------------------------- the items


def items(challenge: Challenge, corpus):
    """The questions, a `datasets.Dataset` with the corpus' columns: fresh commands, and sums of the test split.

    `corpus` as of `data.corpus()`. No command's text is in any split of it. Kinds of commands of which there are few (`open the maps`)
    lie in the corpus to the last one, so the fresh ones are of the rich kinds: meetings, reminders, lights, calls. Raises ValueError
    when fewer can be found than asked for.
    """
    import datasets

    known = {p for part in corpus.values() for p in part["prompt"]}
    rows: list[dict] = []
    for _, said, prompt, answer in data._assistant_documents(_DRAWN, challenge.seed):
        if len(rows) == challenge.assistant:
            break
        if prompt not in known:
            known.add(prompt)
            rows.append({"domain": "assistant", "id": f"assistant:{said}", "prompt": prompt, "answer": answer})
    if len(rows) < challenge.assistant:
        raise ValueError(f"assistant={challenge.assistant}: only {len(rows)} commands are not in the corpus; ask for fewer")
    test = corpus["test"]
    sums = [i for i, d in enumerate(test["domain"]) if d == "arithmetic"]
    if len(sums) < challenge.arithmetic:
        raise ValueError(f"arithmetic={challenge.arithmetic}: the test split holds {len(sums)} sums; ask for fewer")
    for i in random.Random(challenge.seed).sample(sums, challenge.arithmetic):
        rows.append({k: test[i][k] for k in ("domain", "id", "prompt", "answer")})
    columns = {k: [r[k] for r in rows] for k in ("domain", "id", "prompt", "answer")}
    return datasets.Dataset.from_dict(columns | {"text": [r["prompt"] + r["answer"] for r in rows]})


def leak(batches: Sequence, tokenizer, held_out) -> str | None:
    """The first item of `held_out` (columns `prompt`, `answer`) whose text lies in the token ids `batches` int64 [B, T]; None for none.

    Looked for as text, anywhere: in each row, and in all rows of a batch one after the other, since packed documents run on over rows.
    Only where neither a letter nor a digit stands right before or behind it, so that `7+12=91` is not found in `37+12=914`. An item in
    other words, or with other spaces, is not found.
    """
    wanted = {(p + a).strip() for p, a in zip(held_out["prompt"], held_out["answer"], strict=True)} - {""}
    for batch in batches:
        rows = batch.tolist()
        for text in (*map(tokenizer.decode, rows), tokenizer.decode([token for row in rows for token in row])):
            for item in wanted:
                if item in text and re.search(rf"(?<!\w){re.escape(item)}(?!\w)", text):
                    return item
    return None


# ------------------------------------------------------------------------------------------------------------- an entry


@dataclass(frozen=True)
class Entry:
    """One submission, weighed and scored. Bytes and right answers are measured here, the time of a token is modelled.

    `correct` {domain: one character per item, "1" for a right answer}, in the order of the items: what paired comparisons need.
    `because`: why it does not fit; empty for one that does. `folder`: what was scored, relative to the board's folder where it lies in it.
    `sha256`: of what answered there, the weights' files and the config; by it `rescore` knows that they are the same.
    """

    name: str
    model: str
    weight_bytes: int
    memory_bytes: int
    ms_per_token: float
    ms_low: float
    ms_high: float
    correct: Mapping[str, str]
    because: tuple[str, ...] = ()
    folder: str = ""
    sha256: str = ""
    recipe: str = ""
    covered: str = ""
    seconds: float = 0.0
    machine: str = ""
    provenance: str = "measured here"

    def __post_init__(self) -> None:
        object.__setattr__(self, "because", tuple(self.because))
        if set(self.correct) != set(DOMAINS) or any(set(bits) - {"0", "1"} or not bits for bits in self.correct.values()):
            raise ValueError(f"correct of {self.name!r} must hold a character 0 or 1 per item for {' and '.join(DOMAINS)}")

    @property
    def fits(self) -> bool:
        return not self.because

    @property
    def answers(self) -> dict[str, np.ndarray]:
        """{domain: bool [items]}"""
        return {d: np.array([c == "1" for c in self.correct[d]]) for d in DOMAINS}

    @property
    def score(self) -> float:
        """The mean over domains of the share of right answers, 0 .. 1."""
        return float(np.mean([a.mean() for a in self.answers.values()]))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score."""
        return mean_interval([a.astype(float) for a in self.answers.values()])

    @property
    def verdict(self) -> str:
        return "fits" if self.fits else f"does not fit: {'; '.join(self.because)}"

    def to_dict(self) -> dict:
        low, high = self.interval()
        derived = {"score": round(self.score, 6), "low": round(low, 6), "high": round(high, 6), "fits": self.fits}  # for people
        return asdict(self) | {"because": list(self.because), "correct": dict(self.correct)} | derived

    @classmethod
    def from_dict(cls, d: Mapping) -> "Entry":
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in d.items() if k in known})

    def __repr__(self) -> str:
        low, high = self.interval()
        return f"Entry({self.name!r}: {100 * self.score:.1f} % [{100 * low:.1f}, {100 * high:.1f}] right, {self.verdict})"


def _spread(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Resampled means over domains of the means [items] of each, float64 [resamples]; the draws depend on the lengths alone: paired."""

    def draws(n: int, seed: int) -> np.ndarray:  # how often each item counts, as `evaluate.draws`, without its torch: a board is NumPy
        return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)

    return np.mean([draws(len(p), i) @ p / len(p) for i, p in enumerate(parts)], axis=0)


def mean_interval(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean over domains of the means of `parts` (each [items], values 0 .. 1).

    Resampled domain by domain. A domain that is all 0 or all 1 does not vary when it is resampled, which would claim certainty: its
    open side is the exact binomial bound, weighed like the domain (an upper bound on the width, not the shortest interval).

    >>> [round(x, 3) for x in mean_interval([np.ones(100), np.ones(100)])]  # 1 - 0.025 ** (1 / 100) = 0.036 on either
    [0.964, 1.0]
    """
    low, high = (float(x) for x in np.quantile(_spread(parts), [0.025, 0.975]))
    for p in parts:
        open_side = (1 - 0.025 ** (1 / len(p))) / len(parts)
        low -= open_side if p.all() else 0.0
        high += open_side if not p.any() else 0.0
    return max(low, 0.0), min(high, 1.0)


def difference(one: Entry, other: Entry) -> tuple[float, float, float]:
    """(score of `one` - score of `other`, low, high): a paired 95 % interval over the items. Raises ValueError for other items."""
    a, b = one.answers, other.answers
    for d in DOMAINS:
        if len(a[d]) != len(b[d]):
            raise ValueError(f"{one.name!r} answered {len(a[d])} items of {d}, {other.name!r} {len(b[d])}: not the same items")
    parts = [a[d].astype(float) - b[d] for d in DOMAINS]
    low, high = (float(x) for x in np.quantile(_spread(parts), [0.025, 0.975]))
    return one.score - other.score, low, high


# ------------------------------------------------------------------------------------------------------------- the board


@dataclass(frozen=True)
class Place:
    """An entry with its rank (None: it does not fit), and how it compares with the best of the rank above or its own."""

    rank: int | None
    entry: Entry
    told: str


def ranked(entries: Sequence[Entry]) -> list[Place]:
    """Best first; those that do not fit come last, without a rank. See the module for ties."""
    fit = sorted((e for e in entries if e.fits), key=lambda e: (-e.score, e.memory_bytes, e.name))
    places: list[Place] = []
    head: Entry | None = None
    rank = 0
    for i, e in enumerate(fit, 1):
        if head is None:
            head, rank, told = e, 1, "leads"
        else:
            d, low, high = difference(head, e)
            band = f"{100 * d:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
            if low > 0:
                told = f"{band} behind {head.name}: significant"
                head, rank = e, i
            else:
                told = f"{head.name} is not significantly better: {band}"
        places.append(Place(rank, e, told))
    rest = sorted((e for e in entries if not e.fits), key=lambda e: (-e.score, e.memory_bytes, e.name))
    return places + [Place(None, e, "") for e in rest]


class Board:
    """The entries of one challenge in a JSON file. Every change reads, adds and replaces the file whole, one writer at a time."""

    def __init__(self, path: str | Path, challenge: Challenge, fingerprint: str) -> None:
        self.path, self.challenge, self.fingerprint = Path(path), challenge, fingerprint
        self.entries  # noqa: B018 (a board of another challenge is refused now, not after the work)

    @property
    def entries(self) -> list[Entry]:
        """As the file says now; none where there is no file. Raises ValueError for a file of another challenge, or one that is none."""
        return [Entry.from_dict(d) for d in self._stored()]

    def _stored(self) -> list[dict]:
        """The entries as the file has them."""
        if not self.path.is_file():
            return []
        try:
            d = json.loads(self.path.read_text(encoding="utf-8"))
            entries = [e for e in d["entries"] if Entry.from_dict(e)]
            given, items_of = d["challenge"], d["items"]
            version = d["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no board ({error}); move it away to begin a new one") from error
        if version != 1:
            raise ValueError(f"{self.path} has format {version!r}, this edgelab reads 1: it was written by another version")
        mine = asdict(self.challenge)
        other = next((k for k in mine if given.get(k) != mine[k]), None)
        if other is not None or items_of != self.fingerprint:
            what = f"{other}={given.get(other)!r}, not {mine[other]!r}" if other else f"items {items_of}, not {self.fingerprint}"
            raise ValueError(f"{self.path} is the board of another challenge ({what}); its entries can't be compared: use another folder")
        return entries

    def add(self, entry: Entry) -> None:
        """Puts `entry` on the board, in the place of one with the same name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = entry.to_dict()  # before the lock: its interval takes a moment
        with _one_writer(self.path):
            kept = [e for e in self._stored() if e["name"] != entry.name] + [new]
            d = {"format": 1, "challenge": asdict(self.challenge), "items": self.fingerprint, "entries": kept}
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(d, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)

    def places(self) -> list[Place]:
        return ranked(self.entries)

    def rows(self) -> list[dict[str, str]]:
        """A line per entry, best first."""
        lines = []
        for p in self.places():
            e, (low, high) = p.entry, p.entry.interval()
            lines.append(
                {
                    "rank": "–" if p.rank is None else str(p.rank),
                    "name": e.name,
                    "exact match, % (measured here)": f"{100 * e.score:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                    **{d: f"{100 * e.answers[d].mean():.1f}" for d in DOMAINS},
                    "weights, MB (counted)": f"{e.weight_bytes / 1e6:.3f}",
                    "memory, MB": f"{e.memory_bytes / 1e6:.2f}",
                    "ms per token (modelled)": f"{e.ms_per_token:.1f}",
                    "verdict": e.verdict,
                    "against": p.told,
                }
            )
        return lines

    def say(self) -> str:
        """Who leads, in a sentence."""
        places = self.places()
        first = [p.entry for p in places if p.rank == 1]
        if not first:
            return f"{len(places)} entries, and none of them fits." if places else "Nobody has submitted anything yet."
        low, high = first[0].interval()
        lead = f"{first[0].name} leads with {100 * first[0].score:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        shared = f"; {', '.join(e.name for e in first[1:])} not significantly behind" if first[1:] else ""
        return f"{lead}{shared}. {sum(p.rank is not None for p in places)} of {len(places)} entries fit."

    def __repr__(self) -> str:
        return f"Board({self.challenge.device}/{self.challenge.scale:g}, {len(self.entries)} entries: {self.say()})"

    def _repr_html_(self) -> str:
        return html_table.lines(self.rows(), self.say())


@contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Waits until no other process writes `path`. A lock that was left behind by a kill is taken over after a minute."""
    lock, began = path.with_name(f".{path.name}.lock"), time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            try:
                if time.time() - lock.stat().st_mtime > _STALE_S:
                    lock.unlink(missing_ok=True)
                    continue
            except FileNotFoundError:
                continue
            if time.monotonic() - began > _LOCK_S:
                raise TimeoutError(f"{lock} is there for {_LOCK_S:g} s: another process writes the board; try again") from None
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- weighing


def checked_bundle(folder: str | Path):
    """(the model of a bundle, its audit), after its files, its manifest and its tensors were found to say the same.

    Raises ValueError for files that changed after they were written, for a coverage that is not what the tensors are, and for
    weights' files that hold more than the audit counts; FileNotFoundError where there is no bundle.
    """
    from edgelab.bundle import coverage_of, load_bundle, verify_bundle
    from edgelab.compress import audit

    verify_bundle(folder)
    model = load_bundle(folder)
    stated, found = coverage_of(folder), audit(model)
    said = {r.name: (r.scheme, r.shape, r.predicted_bytes) for r in stated}
    real = {r.name: (r.scheme, r.shape, r.predicted_bytes) for r in found}
    if said != real:
        name = sorted({*said.items()} ^ {*real.items()}, key=str)[0][0]
        raise ValueError(
            f"{folder}: the coverage says {_of(said, name)} of {name}, its tensors are {_of(real, name)}: "
            "the bundle is not what it claims to be"
        )
    stored = tensor_bytes(folder)
    if stored != found.predicted_bytes:
        raise ValueError(
            f"{folder}: its files hold {stored:,} bytes of tensors and the audit accounts for {found.predicted_bytes:,}; "
            "write it with save_bundle"
        )
    return model, found


def _of(rows: Mapping, name: str) -> str:
    return f"{rows[name][0]}, {rows[name][2]:,} bytes" if name in rows else "nothing"


def tensor_bytes(folder: str | Path) -> int:
    """Bytes of all tensors in all safetensors files of `folder`, whether the index names them or not: files less their headers."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with file.open("rb") as f:
            total += file.stat().st_size - 8 - int.from_bytes(f.read(8), "little")
    return total


def file_bytes(folder: str | Path) -> int:
    """Bytes of the weights' files in `folder`, headers counted."""
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """The sha256 of what answers questions in `folder`: names and contents of its weights' files, their index and the config."""
    whole = hashlib.sha256()
    for file in sorted(f for f in Path(folder).iterdir() if f.suffix == ".safetensors" or f.name in _ANSWERS):
        with file.open("rb") as f:
            whole.update(f"{file.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


class Capstone:
    """The challenge with its items, and the `board` in `folder`. `corpus` as of `data.corpus()`; it is made when it is not given.

    Scoring reads only what lies on disk: a recipe or a model is written as a bundle below `folder` first.
    """

    def __init__(
        self,
        folder: str | Path = "runs/12",
        challenge: Challenge | None = None,
        *,
        corpus=None,
        calibration_tokens: int = 4096,
        board: str | Path = "board.json",
    ) -> None:
        from edgelab.model import load_tokenizer

        self.folder, self.challenge = Path(folder), challenge or Challenge()
        self.corpus = data.corpus() if corpus is None else corpus
        self.tokenizer = load_tokenizer(data_dir() / "edge-moe")
        self.items = items(self.challenge, self.corpus)
        self.board = Board(self.folder / board, self.challenge, data.fingerprint(self.items))
        self._batches: dict[tuple, list] = {}
        self._tokens = calibration_tokens

    # ----------------------------------------------------------------------------------------- what methods may read

    def calibration(self, tokens: int | None = None) -> list:
        """Batches of the calibration split, `calibration_tokens` unless given: what a recipe gets that was given none."""
        return self._read("calibration", tokens or self._tokens)

    def training(self, tokens: int = 100_000) -> list:
        """Batches of the training split."""
        return self._read("train", tokens)

    def _read(self, split: str, tokens: int) -> list:
        if (split, tokens) not in self._batches:
            self._batches[split, tokens] = data.calibration_batches(self.tokenizer, self.corpus[split], tokens=tokens, context=256)
        return self._batches[split, tokens]

    def refuse_leaks(self, batches: Sequence | None, what: str) -> None:
        """Raises ValueError when `batches` hold an item of this challenge, or a scored document of the test split."""
        if batches is None:
            return
        test = self.corpus["test"]
        pairs = [*zip(self.items["prompt"], self.items["answer"], strict=True), *zip(test["prompt"], test["answer"], strict=True)]
        held_out = {"prompt": [p for p, a in pairs if a], "answer": [a for _, a in pairs if a]}
        found = leak(batches, self.tokenizer, held_out)
        if found is not None:
            raise ValueError(f"{what} holds {found!r}, which is held out for the score; take it from corpus()['calibration'] or ['train']")

    # ----------------------------------------------------------------------------------------------------- submitting

    def submit(
        self,
        what,
        name: str,
        *,
        model: str = "edge-moe",
        calibration: Sequence | None = None,
        training: Sequence | None = None,
        stage: Stage | None = None,
    ) -> Entry:
        """The entry `name`, weighed, scored and on the board.

        `what`: a `Recipe` (done to the embedded `model`), a model of transformers, what `compress` returns, or the folder of a bundle or
        checkpoint. `calibration`, `training`: token ids for recipes that read (some of the right splits unless given). `stage` is told what
        is being done. Raises ValueError for what is refused (see the module), and whatever `compress` raises.
        """
        began, tell = time.perf_counter(), stage or (lambda _: None)
        if not isinstance(name, str) or not 1 <= len(name.strip()) <= 60:
            raise ValueError(f"name={name!r}: give the entry a name of 1 to 60 characters")
        name = name.strip()
        if isinstance(what, str | Path):
            folder, stored, recipe, of = Path(what), str(Path(what).resolve()), _recipe_of(what), Path(what).name
        else:
            tell("compressing")
            made, recipe, of = self._made(what, model, calibration, training)
            tell("writing the bundle")
            folder = self._write(made, recipe, name)
            stored = folder.relative_to(self.folder).as_posix()
        tell("counting bytes")
        entry = self._weighed(folder, name, of, stored, recipe)
        tell("answering")
        entry = replace(entry, correct=self._answers(folder), seconds=round(time.perf_counter() - began, 2))
        self.board.add(entry)
        tell("done")
        return entry

    def _made(self, what, model: str, calibration, training):
        """(what was compressed, the recipe as text, what it was made from)."""
        from torch import nn

        from edgelab.compress import Compressed, audit, compress
        from edgelab.model import load

        self.refuse_leaks(calibration, "calibration")
        self.refuse_leaks(training, "training")
        if isinstance(what, Recipe):
            if model not in MODELS:
                raise ValueError(f"model={model!r} is not one of {', '.join(MODELS)}")
            if calibration is None and not what.data_free:
                calibration = self.calibration()
            if training is None and what.learns:
                training = self.training()
            made = compress(
                load(data_dir() / model), what, calibration=calibration, training=training, progress=False, inplace=not what.learns
            )
            return made, what.to_json(), model
        if isinstance(what, Compressed):
            return what, what.recipe.to_json(), type(what.model).__name__
        if isinstance(what, nn.Module):
            if not hasattr(what, "config"):
                raise ValueError(f"what is a {type(what).__name__} without a config; submit a causal language model of transformers")
            return Compressed(what, audit(what), Recipe(())), "", type(what).__name__
        raise TypeError(f"what is a {type(what).__name__}; submit a Recipe, a model, what compress returns, or the folder of a bundle")

    def _write(self, made, recipe: str, name: str) -> Path:
        """The bundle of an entry, below the board's folder. An older one of that name is replaced."""
        from edgelab.bundle import save_bundle

        folder = self.folder / "entries" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "entry")
        if folder.exists() and any(e.name != name and e.folder == folder.relative_to(self.folder).as_posix() for e in self.board.entries):
            raise ValueError(f"name={name!r} would take the folder of another entry ({folder.name}); choose another name")
        if folder.exists():
            shutil.rmtree(folder)
        return save_bundle(made.model, self.tokenizer, folder, recipe=made.recipe, coverage=made.coverage)

    def _weighed(self, folder: Path, name: str, of: str, stored: str, recipe: str) -> Entry:
        """The entry without its answers."""
        from edgelab.bundle import MANIFEST

        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; submit the folder of a bundle or of a checkpoint")
        if (folder / MANIFEST).is_file():
            _, coverage = checked_bundle(folder)
            covered = repr(coverage)
        else:
            covered = "a plain checkpoint: bytes of its files"
        shape, weights = from_folder(folder), file_bytes(folder)
        memory, prediction = self.challenge.needs(shape, weights), self.challenge.predict(shape)
        if prediction.decode is None:
            raise ValueError(f"{self.challenge.device} can't be predicted for {name!r}: {prediction.missing.get('decode', 'no number')}")
        ms, fastest, slowest = (1e3 / x for x in (prediction.decode.value, prediction.decode.high, prediction.decode.low))
        return Entry(
            name=name, model=of, weight_bytes=weights, memory_bytes=round(memory), ms_per_token=round(ms, 3), ms_low=round(fastest, 3),
            ms_high=round(slowest, 3), correct=dict.fromkeys(DOMAINS, "0"), because=self.challenge.why_not(memory, ms), folder=stored,
            sha256=weights_sha256(folder), recipe=recipe, covered=covered, machine=machine(),
        )  # fmt: skip

    def _answers(self, folder: Path) -> dict[str, str]:
        """{domain: a character per item} of the greedy answers of the model in `folder`, in the items' order of evaluation (by hash)."""
        from edgelab.evaluate import measure
        from edgelab.model import load

        measured = measure({"entry": load(folder)}, self.tokenizer, self.items, max_docs=None, progress=False)
        return {d: "".join("01"[int(c)] for c in measured.scores["entry"][d].correct) for d in DOMAINS}

    # ------------------------------------------------------------------------------------------------------- rescoring

    def rescore(self, seed: int, path: str | Path | None = None) -> Board:
        """A new board: every entry of this one that fits answers the items of another seed. `path`: board-<seed>.json beside this one
        unless given.

        For the end of a contest: nobody can have tuned to questions whose seed was named after the deadline. Raises ValueError for
        an entry whose folder has changed since.
        """
        if seed == self.challenge.seed:
            raise ValueError(f"seed={seed} is the seed of this board; name another")
        name = f"board-{seed}.json" if path is None else Path(path).absolute()  # an absolute path stays what it is behind a folder
        other = Capstone(self.folder, replace(self.challenge, seed=seed), corpus=self.corpus, board=name)
        board = other.board
        for entry in (e for e in self.board.entries if e.fits):
            inside = self.folder / entry.folder
            folder = inside if inside.is_dir() else Path(entry.folder)
            weighed = other._weighed(folder, entry.name, entry.model, entry.folder, entry.recipe)
            if weighed.sha256 != entry.sha256:
                raise ValueError(
                    f"{folder} has weights of sha256 {weighed.sha256[:12]}..., the board says {entry.sha256[:12] or 'none'}...: "
                    f"it was changed after {entry.name!r} was submitted; put the files back, or submit it again"
                )
            board.add(replace(weighed, correct=other._answers(folder)))
        return board

    def __repr__(self) -> str:
        return f"Capstone({self.challenge.say()} {self.board.say()})"


def _recipe_of(folder: str | Path) -> str:
    """The recipe that a bundle says it was made by, as text; "" for a checkpoint."""
    from edgelab.bundle import MANIFEST

    file = Path(folder) / MANIFEST
    if not file.is_file():
        return ""
    try:
        return json.dumps(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError):
        return ""  # `verify_bundle` says what is wrong with it
