"""The checks of notebook 11's exercises: a verdict by the rule, bits behind a size, a break-even. Each names the likely slip."""

from edgelab.exercises import hint, numbers
from edgelab.ledger import Claim, Entry, judge

LOSS = (0.5, -0.1, 1.1)  # points lost, low, high
BOARD = {"price": 249.0, "years": 4.0, "watts": 15.0, "per_kwh": 0.30, "answer": 0.0005}


def exercise_verdict() -> str:
    """The verdict of exercise 1, by the ledger's own rule."""
    claim = Claim("X1", "an article", "", "accuracy loss", "0.8", "%", "", "measure", "at most", "0.8", "points lost", None, 0.0, "")
    return judge(claim, Entry("X1", "exercise", *LOSS, "points lost", 1000, "answers")).word


def check_verdict(answer) -> str:
    """Exercise 1: the verdict on "at most 0.8 % lost" for a loss of 0.5 [-0.1, 1.1].

    >>> check_verdict("holds in part")[:5], check_verdict("holds")[:7]
    ('Right', 'Not yet')
    """
    said = str(answer).strip().lower().removesuffix(".")
    right = exercise_verdict()
    if said == right:
        return "Right: the estimate is below 0.8, but the data would allow 1.1 as well. More answers would narrow that."
    hints = {
        "holds": "the estimate is on the right side, and is its whole interval?",
        "doesn't hold here": "the estimate itself is on the right side: it is not refuted either",
        "can't be tested without the hardware": "it was measured: no hardware is missing",
    }
    return f"Not yet: {hints.get(said, f'give one of the verdicts as a text, such as {right[:5]!r}')}."


def check_bits(answer) -> str:
    """Exercise 2: bits per weight behind 13 GB -> 3.2 GB, where 13 GB are 16 bits each.

    >>> check_bits(3.94)[:5], check_bits(4.0)[:7], check_bits(4.0625)[:7]
    ('Right', 'Not yet', 'Not yet')
    """
    found, right = numbers(answer, 1), 16 * 3.2 / 13
    if found is None:
        return "Not yet: give one number."
    if abs(found[0] - right) <= 0.01:
        return f"Right: {right:.2f} bits, so not even 4-bit codes without a scale fit. One of the two sizes is rounded."
    hints = {
        4.0: "that is what is wanted of it, not what 3.2 GB are",
        13 / 3.2: "that is how many times smaller; what are 16 bits divided by it",
        32 * 3.2 / 13: "13 GB are 16 bits a weight here, not 32",
        4.5: "int4-g32 with its scales would take that; what do 3.2 GB take",
    }
    return hint(found[0], hints, "16 bits times the share of the bytes that is left", tolerance=0.01)


def break_even_per_day() -> float:
    """Requests a day at which the board of exercise 3 costs what the API does."""
    b = BOARD
    year = b["price"] / b["years"] + b["watts"] * 8.766 * b["per_kwh"]
    return year / b["answer"] / 365.25


def check_break_even(answer) -> str:
    """Exercise 3: from how many requests a day is the board cheaper?

    >>> check_break_even(557)[:5], check_break_even(341)[:7], check_break_even(1579)[:7]
    ('Right', 'Not yet', 'Not yet')
    """
    found, right = numbers(answer, 1), break_even_per_day()
    if found is None:
        return "Not yet: give one number."
    if abs(found[0] - right) <= 0.01 * right:
        return f"Right: {right:.0f} a day. Below that the cloud is cheaper, so '68 % lower' says nothing without the number of requests."
    b = BOARD
    power = b["watts"] * 8.766 * b["per_kwh"]
    days = b["answer"] * 365.25
    hints = {
        b["price"] / b["years"] / days: "the board takes power, too: 15 W all year",
        (b["price"] + power) / days: "the price is spread over four years",
        (b["price"] / b["years"] + 1000 * power) / days: "watts times hours are Wh; the price is per kWh",
        right * 365.25: "that is per year",
    }
    return hint(found[0], hints, "a year of the board, divided by what an answer costs and by 365.25", tolerance=0.01 * right)
