"""What the commands of every module of the command line share: arguments, checks before work, printing, errors as one sentence."""

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgelab import words
from edgelab.export import ExportError
from edgelab.report import Report

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)


class CheckFailedError(Exception):
    """Something was measured and is not as it must be: exit code 1."""


def expected(error: Exception) -> bool:
    """Bad input or a broken model or data set (numbers that overflow are ArithmeticErrors); anything else is our mistake."""
    return isinstance(error, ValueError | OSError | ArithmeticError) or type(error).__module__.split(".")[0] == "datasets"


def guarded(command: Callable) -> Callable:
    """`command` with its expected errors turned into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except CheckFailedError as error:
            code, said = 1, f"Failed: {error}"
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("edgelab"):
                raise
            code, said = 2, f"Error: the package {error.name!r} is missing; `edgelab doctor` says what it is for and how to install it"
        except ExportError as error:
            code, said = 1, f"Failed: {error}"
        except Exception as error:
            if os.environ.get("EDGELAB_DEBUG") or not expected(error):
                raise
            code, said = 2, f"Error: {error}"
        err_console.print(said, markup=False, style="bold red", soft_wrap=True)
        raise typer.Exit(code)

    return run


# --------------------------------------------------------------------------------------------------- arguments

Threads = Annotated[int, typer.Option("--threads", help="Threads for torch and numba; 0: all usable cores.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the bootstrap and of the choice of documents.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is at --out.")]
CalibrationData = Annotated[
    str | None, typer.Option("--data", help="Text to calibrate on, as for evaluate; of it the calibration split. By default the corpus'.")
]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", help="At most so many tokens of it.", min=1)]
MaxDocs = Annotated[int, typer.Option("--max-docs", help="Documents per domain; 0: all.", min=0)]


def set_threads(n: int) -> int:
    """Set the threads of torch and numba and return their number."""
    import numba
    import torch

    from edgelab.doctor import usable_cores

    n = min(n or usable_cores(), numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(n)
    numba.set_num_threads(n)
    return n


def may_write(out: Path, force: bool, *, ours: str, models: Iterable[str | Path] = ()) -> None:
    """Make sure that `out` may be written: what lies there stays until its successor is whole. Makes its parent folder, nothing else.

    `ours` is the file that marks a folder as one that we may replace. Raises FileExistsError, and ValueError when `out`
    is, holds or lies in one of `models`.
    """
    here = out.resolve()
    for model in models:
        if Path(model).exists():
            there = Path(model).resolve()
            if here == there or here in there.parents or there in here.parents:
                how = "is" if here == there else "holds" if here in there.parents else "lies in"
                raise ValueError(f"--out {out} {how} the model {model}, which would be overwritten or changed; choose another place")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
    elif not force:
        raise FileExistsError(f"--out {out} exists already; choose another place, or give --force to overwrite it")
    elif out.is_dir() and any(out.iterdir()) and not (out / ours).is_file():
        raise FileExistsError(f"--out {out} is a folder that edgelab did not write (it holds no {ours}); --force does not delete it")


@contextmanager
def staged(out: Path):
    """A new folder beside `out` that takes its place at the end; after an error `out` is as it was, and the new one gone."""
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        whole = staging / out.name
        whole.mkdir()
        yield whole
        if out.exists():
            out.rename(staging / "previous")
            try:
                whole.rename(out)
            except BaseException:
                (staging / "previous").rename(out)
                raise
        else:
            whole.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def local_only(*names: str | Path) -> None:
    """Where all of `names` are on this disk, the hub is never needed: tell transformers and datasets not to try."""
    if all(Path(name).exists() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece.*", "tekken.json", "*.tiktoken")


def tokenizer_of(name: str):
    """The tokenizer of the model `name`, None (and a line that says so) where it has none.

    From a folder without a tokenizer's files transformers makes an empty one for some architectures and fails for
    others; neither is wanted. Raises what loading raises where the files are there but do not load.
    """
    from edgelab.model import load_tokenizer

    why = "its folder holds no tokenizer file"
    local = Path(name).is_dir()
    if not local or any(f for pattern in _TOKENIZER_FILES for f in Path(name).glob(pattern)):
        try:
            tokenizer = load_tokenizer(name)
            if len(tokenizer) > 1:
                return tokenizer
            why = f"the one that loads knows {len(tokenizer)} token"
        except (ValueError, OSError) as error:
            if local:
                raise
            why = str(error).splitlines()[0]  # a network that fails will fail again, and stop us, when the weights are asked for
    elif not (Path(name) / "config.json").is_file():
        return None  # no model either; loading it says what is wrong
    err_console.print(f"Note: {name} comes without a tokenizer: {why}", markup=False, style="yellow", soft_wrap=True)
    return None


def one_tokenizer(models: list[str]):
    """The tokenizer that all of `models` share; one without its own is taken to use the others'. Raises ValueError."""
    found = {name: tokenizer for name in models if (tokenizer := tokenizer_of(name)) is not None}
    if not found:
        raise ValueError(f"{models[0]} has no tokenizer; put its files (tokenizer.json, tokenizer_config.json) beside config.json")
    (first, tokenizer), *others = found.items()
    vocabulary = tokenizer.get_vocab()
    for name, other in others:
        if (theirs := other.get_vocab()) != vocabulary:
            differ = len(dict(vocabulary.items() ^ theirs.items()))
            raise ValueError(
                f"{name} and {first} have different tokenizers ({len(theirs):,} and {len(vocabulary):,} tokens, {differ:,} differ): "
                "their figures per token cannot be compared; evaluate them one at a time and compare bits per byte"
            )
    return tokenizer


def read_documents(source: str | None):
    """The embedded corpus' test split, or all documents of any source that `edgelab.data.from_source` reads."""
    import datasets

    from edgelab.data import corpus, from_source

    if source is None:
        return corpus()["test"]
    splits = from_source(source, label=Path(source).stem or "text")
    return datasets.concatenate_datasets([part for part in splits.values() if len(part)])


def read_calibration(tokenizer, model: str, source: str | None, tokens: int, context: int, split: str = "calibration") -> list:
    """Batches of tokens of the embedded corpus' calibration (or training) split, or of that of any other source."""
    from edgelab.data import calibration_batches, corpus, from_source

    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, and this recipe has to see text: put its files beside config.json")
    splits = corpus() if source is None else from_source(source, label=Path(source).stem or "text")
    return calibration_batches(tokenizer, splits[split], tokens=tokens, context=context)


def context_of(models: Iterable, asked: int | None) -> int:
    """Tokens of a window: `asked`, or 512; never more than the positions that every one of `models` has."""
    configs = [getattr(m.config, "get_text_config", lambda m=m: m.config)() for m in models]
    most = min((n for c in configs if (n := getattr(c, "max_position_embeddings", None))), default=None)
    if asked is not None and most is not None and asked > most:
        raise ValueError(f"--context {asked} is more than the {most} positions that the models have")
    return asked or min(512, most or 512)


# ------------------------------------------------------------------------------------------------------- print


def print_table(rows: list[dict[str, str]], title: str, *, right: Iterable[str] = ()) -> None:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(row.get(c, "")) for c in columns))  # or rich would read [lab] as markup
    out_console.print(table, markup=False) if out_console.is_terminal else Console(width=200, highlight=False).print(table)
    out_console.print()


def print_report(report: Report, title: str) -> None:
    print_table(words.table(report), title, right=report.models())


def print_coverage(coverage, title: str) -> None:
    print_table(coverage.table(), title, right=("parameters", "touched", "bytes", "bits per weight"))
    out_console.print(words.say_coverage(coverage) + "\n", markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A detail below the line of its step."""
    out_console.print(f"      {text}", markup=False, soft_wrap=True)


class Steps:
    """Prints a numbered line per step and, when it ends, the seconds it took."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()

    @contextmanager
    def __call__(self, text: str):
        self.done += 1
        started = time.perf_counter()
        out_console.print(f"[{self.done}/{self.total}] {text}", markup=False, soft_wrap=True, style="bold")
        yield
        out_console.print(f"      done in {time.perf_counter() - started:.1f} s", markup=False, style="dim")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started
