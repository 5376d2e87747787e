"""What the checks of the notebooks' exercises share: reading an answer, and saying what is wrong with it.

A check takes what the reader wrote and gives a `Verdict`: a text that begins with "Right" or "Not yet", which also knows
whether the answer `passed`. A check that says only "wrong" teaches nothing, and one that is satisfied too easily teaches
something false: so each check names the misconception that leads to a wrong answer where it knows it, and the tests hand it
such answers (*mutants*, beside the exercise in `notebooks/src`), each of which it has to reject.

Two kinds of answers: numbers (`numbers`, `hint`) and functions (`check_function`), which are called on several inputs and
compared with the package's own code, the plain case first and the edges after it.
"""

import copy
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LOOKS = {True: ("✓", "#009E73"), False: ("✗", "#D55E00")}  # of Okabe and Ito's colours; the words say the same


class Verdict(str):
    """What a check says: a text, with `passed`, shown green or red in a notebook and plain anywhere else.

    >>> right("48 tokens per second"), not_yet("these are bits; asked is bytes").passed
    (Right: 48 tokens per second., False)
    """

    passed: bool

    def __new__(cls, text: str, passed: bool = False):
        verdict = super().__new__(cls, text)
        verdict.passed = passed
        return verdict

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        sign, colour = _LOOKS[self.passed]
        style = f"border-left: 0.4em solid {colour}; padding: 0.3em 0.8em; overflow-wrap: anywhere"
        said = html.escape(str(self)).replace("\n", "<br>")
        return f'<div role="status" style="{style}"><span aria-hidden="true">{sign} </span>{said}</div>'


def right(text: str) -> Verdict:
    """The verdict on a right answer: "Right: `text`."."""
    return Verdict(_sentence("Right", text), True)


def not_yet(text: str) -> Verdict:
    """The verdict on an answer that is wrong, of another form, or not there: "Not yet: `text`."."""
    return Verdict(_sentence("Not yet", text), False)


def unanswered(form: str) -> Verdict:
    """The verdict on a stub that nobody has touched; `form` is what an answer looks like.

    >>> unanswered("a list of eight codes, each 0 .. 7")
    Not yet: no answer so far. It is a list of eight codes, each 0 .. 7.
    """
    return not_yet(f"no answer so far. It is {form}")


def _sentence(begin: str, text: str) -> str:
    text = text.strip().removeprefix(f"{begin}:").strip()
    return f"{begin}: {text}" + ("" if text.endswith((".", "!", "?")) else ".")


def numbers(answer, count: int) -> list[float] | None:
    """`answer` as `count` finite numbers, or None when it is something else.

    >>> numbers([1, "2"], 2), numbers("x", 1), numbers(3, 2)
    ([1.0, 2.0], None, None)
    """
    if hasattr(answer, "detach"):  # a torch tensor, also one that requires a gradient
        answer = answer.detach().cpu()
    try:
        found = [float(a) for a in np.asarray(answer, dtype=float).reshape(-1)]
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def hint(value: float, hints: Mapping[float, str], otherwise: str, tolerance: float = 2e-3) -> Verdict:
    """ "Not yet", with the hint of the wrong value that `value` is, or `otherwise`; above 1 `tolerance` is relative.

    >>> hint(79.7, {79.69: "not in per cent"}, "think again")
    Not yet: not in per cent.
    """
    return not_yet(next((h for v, h in hints.items() if abs(value - v) <= tolerance * max(1.0, abs(v))), otherwise))


# ---------------------------------------------------------------------------------------------------------- functions


@dataclass(frozen=True)
class Case:
    """One input that a reader's function is tried on: what it is, in words, and what to think of if it goes wrong there.

    `arguments` are handed over as copies, so that a function which changes them spoils nothing (and is told).
    """

    name: str  # such as "a group of zeros": the verdict says "for a group of zeros ..."
    arguments: tuple
    hint: str = ""
    names: Mapping[str, Any] = field(default_factory=dict)  # arguments given by name


def check_function(
    answer,
    twin: Callable,
    cases: Sequence[Case],
    form: str,
    praise: str,
    parts: Sequence[str] = ("result",),
    tolerance: float = 1e-6,
) -> Verdict:
    """The verdict on a function that a reader wrote: does it do on all `cases` what `twin` does?

    `twin` is the package's own function (or a lambda around it), `form` says what is asked ("a function of a group of weights
    that returns (scale, codes)"), `praise` what a right answer hears. With several `parts` a tuple of as many things is asked (or
    one array of as many), and they are the things' names. Results are numbers or arrays (NumPy, torch, lists, bytes), compared to
    `tolerance`, relative and absolute; NaN equals NaN. The first case that goes wrong is told, and its hint.

    >>> double = lambda x: 2 * x
    >>> cases = [Case("1.5", (1.5,)), Case("a negative number", (-1.0,), "the sign stays")]
    >>> check_function(abs, double, cases, "a function of a number", "twice is twice")
    Not yet: for 1.5, the result is 1.5, and 3 is right.
    >>> check_function(lambda x: abs(2 * x), double, cases, "a function of a number", "twice is twice")
    Not yet: for a negative number, the result is 2, and -2 is right. Hint: the sign stays.
    >>> check_function(double, double, cases, "a function of a number", "twice is twice").passed
    True
    """
    if answer is None or answer is Ellipsis:
        return unanswered(form)
    if not callable(answer):
        return not_yet(f"this is {_kind(answer)}, and asked is {form}")
    for case in cases:
        given = copy.deepcopy(case.arguments), copy.deepcopy(dict(case.names))
        wanted = twin(*copy.deepcopy(case.arguments), **copy.deepcopy(dict(case.names)))
        where = f"for {case.name}, "
        try:
            got = answer(*given[0], **given[1])
        except Exception as error:  # whatever the reader's code does
            return _with_hint(f"{where}your function raises {type(error).__name__}: {error}", case)
        if got is None and wanted is not None:
            return unanswered(form) if case is cases[0] else _with_hint(f"{where}your function returns None", case)
        if not _same((case.arguments, dict(case.names)), given):
            return not_yet(f"{where}your function changes its argument; work on a copy")
        if wrong := _difference(got, wanted, parts, tolerance, form):
            return _with_hint(where + wrong, case)
    return right(praise)


def _with_hint(text: str, case: Case) -> Verdict:
    return not_yet(_sentence("Not yet", text).removeprefix("Not yet: ") + (f" Hint: {case.hint}" if case.hint else ""))


def _kind(answer) -> str:
    name = type(answer).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _difference(got, wanted, parts: Sequence[str], tolerance: float, form: str) -> str:
    """In which way what came back differs from what is `wanted`, in words; "" where it does not."""
    if len(parts) == 1:
        got, wanted = (got,), (wanted,)
    elif getattr(got, "ndim", 0) == 1 and len(got) == len(parts) and all(np.ndim(w) == 0 for w in wanted):
        got = tuple(got)  # np.array([difference, low, high]): as good as a tuple of three numbers
    elif not isinstance(got, tuple | list) or len(got) != len(parts):
        count = f" of {len(got)}" if isinstance(got, tuple | list) else ""
        return f"your function returns {_kind(got)}{count}, and asked are {len(parts)} things: {', '.join(parts)}"
    for part, mine, theirs in zip(parts, got, wanted, strict=True):
        try:
            a, b = _array(mine), _array(theirs)
        except (TypeError, ValueError):
            return f"you return {_kind(mine)} as the {part}, which is no number and no array of numbers; asked is {form}"
        if a.shape != b.shape:
            return f"the shape of the {part} is {list(a.shape)}, and {list(b.shape)} is right"
        off = ~np.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        if off.any():
            first = np.unravel_index(int(off.argmax()), off.shape) if off.ndim else ()
            place = f"[{', '.join(map(str, first))}]" if first else ""
            many = f" ({off.sum()} of {off.size} places differ)" if off.size > 1 else ""
            which = part + place if place else f"the {part}"
            return f"{which} is {_short(a[first])}, and {_short(b[first])} is right{many}"
    return ""


def _array(value) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch for it
        value = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    found = np.asarray(list(value) if isinstance(value, bytes | bytearray) else value)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"no numbers: {found.dtype}")
    return found.astype(np.float64)


def _short(x: float) -> str:
    return f"{x:.6g}"


def _same(a, b) -> bool:
    """Whether two nests of arguments hold the same values."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    try:
        return np.array_equal(_array(a), _array(b), equal_nan=True)
    except (TypeError, ValueError):
        return True  # no array: nothing that our cases hand over can be changed
