"""The checks of notebook 11's exercises: verdicts, bits, a break-even, flips, luck, a tolerance. Each names the likely slip."""

from edgelab.exercises import Verdict, hint, not_yet, numbers, right, unanswered
from edgelab.ledger import VERDICTS, Claim, Entry, judge
from edgelab.paper_tables import Cell
from edgelab.reproduce import Stored, tolerance

LOSS = (0.5, -0.1, 1.1)  # points lost, low, high
BOARD = {"price": 249.0, "years": 4.0, "watts": 15.0, "per_kwh": 0.30, "answer": 0.0005}
BEFORE, AFTER = "1111110000", "0111101100"  # ten answers of a model, and of its compressed form: 1 is right
NULLS = 20  # methods that change nothing
VALUE, AGAIN = 0.0400, (0.0403, 0.0396)  # a KL divergence, and the same run with two threads and on an older processor


def exercise_verdict() -> str:
    """The verdict of the exercise, by the ledger's own rule."""
    claim = Claim("X1", "an article", "", "accuracy loss", "0.8", "%", "", "measure", "at most", "0.8", "points lost", None, 0.0, "")
    return judge(claim, Entry("X1", "exercise", *LOSS, "points lost", 1000, "answers")).word


def check_verdict(answer) -> Verdict:
    """The verdict on "at most 0.8 % lost" for a loss of 0.5 [-0.1, 1.1].

    >>> check_verdict("holds in part").passed, check_verdict("holds").passed, check_verdict(None)[:7]
    (True, False, 'Not yet')
    """
    wanted = exercise_verdict()
    if answer is None or answer is Ellipsis:
        return unanswered("one of the verdicts in the table above, as a text")
    said = str(answer).strip().lower().removesuffix(".")
    if said == wanted:
        return right("the estimate is below 0.8, but the data would allow 1.1 as well. More answers would narrow that")
    hints = {
        "holds": "the estimate is on the right side, and is its whole interval?",
        "doesn't hold here": "the estimate itself is on the right side: it is not refuted either",
        "can't be tested without the hardware": "it was measured: no hardware is missing",
        "can't be tested without its model and data": "it was measured, and on the model that the claim is about",
    }
    return not_yet(hints.get(said, f"give one of the verdicts as a text, such as {VERDICTS[0]!r} or {VERDICTS[2]!r}"))


def check_bits(answer) -> Verdict:
    """Bits per weight behind 13 GB -> 3.2 GB, where 13 GB are 16 bits each.

    >>> check_bits(3.94).passed, check_bits(4.0).passed, check_bits(4.0625).passed
    (True, False, False)
    """
    wanted = 16 * 3.2 / 13
    if answer is None:
        return unanswered("one number, of bits")
    if (found := numbers(answer, 1)) is None:
        return not_yet("give one number")
    if abs(found[0] - wanted) <= 0.01:
        return right(f"{wanted:.2f} bits, so not even 4-bit codes without a scale fit. One of the two sizes is rounded")
    hints = {
        4.0: "that is what is wanted of it, not what 3.2 GB are",
        13 / 3.2: "that is how many times smaller; what are 16 bits divided by it",
        32 * 3.2 / 13: "13 GB are 16 bits a weight here, not 32",
        4.5: "int4-g32 with its scales would take that; what do 3.2 GB take",
    }
    return hint(found[0], hints, "16 bits times the share of the bytes that is left", tolerance=0.01)


def break_even_per_day() -> float:
    """Requests a day at which the board of the exercise costs what the API does."""
    b = BOARD
    year = b["price"] / b["years"] + b["watts"] * 8.766 * b["per_kwh"]
    return year / b["answer"] / 365.25


def check_break_even(answer) -> Verdict:
    """From how many requests a day is the board cheaper?

    >>> check_break_even(557).passed, check_break_even(341).passed, check_break_even(1579).passed
    (True, False, False)
    """
    wanted = break_even_per_day()
    if answer is None:
        return unanswered("one number, of answers a day")
    if (found := numbers(answer, 1)) is None:
        return not_yet("give one number")
    if abs(found[0] - wanted) <= 0.01 * wanted:
        return right(f"{wanted:.0f} a day. Below that the cloud is cheaper, so '68 % lower' says nothing without the number of requests")
    b = BOARD
    power = b["watts"] * 8.766 * b["per_kwh"]
    days = b["answer"] * 365.25
    hints = {
        b["price"] / b["years"] / days: "the board takes power, too: 15 W all year",
        (b["price"] + power) / days: "the price is spread over four years",
        (b["price"] / b["years"] + 1000 * power) / days: "watts times hours are Wh; the price is per kWh",
        wanted * 365.25: "that is per year",
    }
    return hint(found[0], hints, "a year of the board, divided by what an answer costs and by 365.25", tolerance=0.01 * wanted)


def check_flips(answer) -> Verdict:
    """Points of accuracy lost, and flips in per cent, between BEFORE and AFTER.

    >>> check_flips((10, 50)).passed, check_flips((10, 10)).passed, check_flips((-10, 50)).passed
    (False, False, False)
    >>> check_flips((0, 40)).passed
    True
    """
    before, after = ([c == "1" for c in text] for text in (BEFORE, AFTER))
    n = len(before)
    lost = 100 * (sum(before) - sum(after)) / n
    flipped = 100 * sum(a != b for a, b in zip(before, after, strict=True)) / n
    worse = 100 * sum(a and not b for a, b in zip(before, after, strict=True)) / n
    if answer is None:
        return unanswered("two numbers: points lost, flips in per cent")
    if (found := numbers(answer, 2)) is None:
        return not_yet("give two numbers: points lost, flips in per cent")
    if max(abs(found[0] - lost), abs(found[1] - flipped)) < 0.01:
        return right(f"{lost:g} points lost and {flipped:g} % of the answers other ones. Who used the model sees the second number")
    if abs(found[0] - lost) >= 0.01:
        return not_yet("how many are right before, and how many after? The difference, over ten")
    hints = {
        worse: "those that became right are other answers, too",
        abs(lost): "flips count answers, one by one: they do not cancel",
        flipped / 10: "in per cent of the ten answers",
        100 - flipped: "that many are the same",
    }
    return hint(found[1], hints, "count the places where the two rows differ")


def check_luck(answer) -> Verdict:
    """The chance that at least one of NULLS methods that change nothing looks better, each with its 95 % interval.

    >>> check_luck(0.397).passed, check_luck(39.7).passed, check_luck(0.5).passed, check_luck(0.64).passed
    (True, True, False, False)
    """
    wanted = 1 - 0.975**NULLS
    if answer is None:
        return unanswered("one number, a share or per cent")
    if (found := numbers(answer, 1)) is None:
        return not_yet("give one number")
    share = found[0] / 100 if found[0] > 1 else found[0]
    if abs(share - wanted) <= 0.01:
        return right(f"{wanted:.0%}. Who tries twenty things and reports the best has to say that it was twenty")
    hints = {
        0.025 * NULLS: "chances of several things do not add up; what is the chance that none of them looks better",
        1 - 0.95**NULLS: "half of those 5 % look worse, not better",
        0.05 * NULLS: "chances do not add up, and half of those 5 % look worse",
        0.975**NULLS: "that is the chance that none does",
        0.025: "that is of one of them; there are twenty",
        0.05: "that is of one of them, on either side; there are twenty",
    }
    return hint(share, hints, "the chance that one does not look better is 0.975; that none of twenty does", tolerance=0.005)


def exercise_tolerance() -> float:
    """How far from VALUE the same seed may be, by the rule of `reproduce`."""
    stored = Stored({}, "", {0: {"int4 | KLD": VALUE}}, {str(i): {"int4 | KLD": v} for i, v in enumerate(AGAIN)})
    return tolerance(stored, Cell("int4", "KLD", VALUE), 0)[1]


def check_tolerance(answer) -> Verdict:
    """How far from VALUE a run of the same seed may be and still agree.

    >>> check_tolerance(0.0012).passed, check_tolerance(0.0004).passed, check_tolerance(0.0009).passed
    (True, False, False)
    """
    wanted = exercise_tolerance()
    if answer is None:
        return unanswered("one number, in nats per token")
    if (found := numbers(answer, 1)) is None:
        return not_yet("give one number")
    if abs(found[0] - wanted) <= 2e-6:
        return right(f"{wanted:.4f}: three times the larger of the two changes. A method that is really 5 % worse would be seen")
    first, second = (abs(v - VALUE) for v in AGAIN)
    hints = {
        max(first, second): "that is what two other runs do; the next machine is another one still: three times that",
        3 * min(first, second): "the larger of the two changes counts",
        3 * (first + second): "the larger of the two counts, not their sum",
        100 * wanted / VALUE: "that is in per cent; asked is how far in nats",
        wanted / VALUE: "that is relative; times the stored value it is in nats",
    }
    return hint(found[0], hints, "three times the largest change that the other runs make", tolerance=2e-6)
