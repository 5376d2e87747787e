"""Behind notebooks 00 and 01: the baseline of a model that knows something, and the checks of their exercises.

Bits per byte put a model and `zlib` on one scale, whatever the tokenizer: the nats of all tokens, over ln 2, over the *bytes* of
the text. Characters would not do (an "ü" is two bytes of UTF-8), and tokens less so, since a large vocabulary makes fewer of them.
"""

import math
import zlib

import numpy as np

from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.qtensor import QTensor
from edgelab.scheme import QuantScheme


def zlib_bits_per_byte(text: str) -> float:
    """Bits that `zlib` at level 9 needs per UTF-8 byte of `text`; raises ValueError for an empty text.

    >>> zlib_bits_per_byte("no no no no no no no no ")
    4.333333333333333
    """
    raw = text.encode()
    if not raw:
        raise ValueError("an empty text has no bits per byte; give at least one character")
    return 8 * len(zlib.compress(raw, 9)) / len(raw)


# ------------------------------------------------------------------------------------------------- exercises of notebook 00

EXPERTS, USED, EXPERT_SHARE = (
    64,
    6,
    0.9,
)  # of a model in the exercise: experts in a layer, of which a token uses, their share of all weights
NATS, BYTES = 1.7, 3.4  # per token


def check_touched(answer) -> Verdict:
    """00, exercise 1: the share of all weights that one token uses, 0 .. 1."""
    if answer is None:
        return unanswered("a share between 0 and 1")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    wanted = 1 - EXPERT_SHARE + EXPERT_SHARE * USED / EXPERTS
    if abs(x[0] - wanted) <= 2e-3:
        return right(f"0.1 + 0.9 * 6 / 64 = {wanted:.3f}. It computes like a model a fifth of its size, and is stored whole")
    hints = {
        USED / EXPERTS: "that is the share of the experts; the other tenth of the weights is used by every token",
        EXPERT_SHARE * USED / EXPERTS: "the tenth that is not experts is missing: every token uses it",
        1 - EXPERT_SHARE: "some experts are used, too",
        18.4: "as a share between 0 and 1, please, not in per cent",
        1 - EXPERT_SHARE + USED / EXPERTS: "6 of 64 is the share of the *experts*, and these are 0.9 of the weights",
    }
    return hint(x[0], hints, "all that is not experts, and of the experts 6 in 64")


def check_bits_per_byte(answer) -> Verdict:
    """00, exercise 2: bits per byte of a model that needs `NATS` per token, on text of `BYTES` per token."""
    if answer is None:
        return unanswered("a number of bits per byte")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    wanted = NATS / math.log(2) / BYTES
    if abs(x[0] - wanted) <= 2e-3:
        return right(f"1.7 / ln 2 = {NATS / math.log(2):.2f} bits per token, over 3.4 bytes: {wanted:.3f}")
    hints = {
        NATS / BYTES: "these are nats per byte; a nat is 1 / ln 2 = 1.44 bits",
        NATS / math.log(2): "these are bits per token; a token is 3.4 bytes",
        NATS * math.log(2) / BYTES: "a nat is more than a bit, not less: divide by ln 2",
        NATS / math.log(2) * BYTES: "a token is several bytes: per byte there are fewer bits than per token",
        NATS: "that is the number of nats per token",
    }
    return hint(x[0], hints, "nats to bits, then tokens to bytes")


def check_zlib(answer) -> Verdict:
    """00, exercise 3: a function of a text that returns zlib's bits per byte."""
    cases = [
        Case("English text", ("the lamp in the kitchen, the lamp in the hall, the lamp in the kitchen again. " * 8,), "a byte has 8 bits"),
        Case("text with umlauts", ("über Äpfel, über Öfen, über Übermut und müde Hühner. " * 6,), "'ü' is one character and two bytes"),
        Case("one letter", ("a",), "zlib's own few bytes count, too: more than 8 bits per byte is possible"),
        Case(
            "binary numbers",
            (" ".join(f"{i:b}" for i in range(300)),),
            "level 9, not zlib's default, 6: it looks further for what repeats, and here it needs more bytes for it",
        ),
        Case("text in Greek", ("ὁ βίος βραχύς, ἡ δὲ τέχνη μακρή. " * 5,)),
    ]
    form = "a function of a text that returns bits per byte"
    praise = "and it is the baseline that a language model has to beat: it knows no language, and finds what repeats"
    return check_function(answer, zlib_bits_per_byte, cases, form, praise, parts=("number of bits per byte",), tolerance=1e-9)


# ------------------------------------------------------------------------------------------------- exercises of notebook 01

BEFORE, AFTER = (0.7, 0.2, 0.1), (0.6, 0.3, 0.1)  # probabilities of three words, of the original and of the compressed model
IN_EXPERTS = 0.8  # of the weights


def check_skipped(answer) -> Verdict:
    """01, exercise 1: bits per weight of a model whose experts (`IN_EXPERTS` of it) stay in 16 bits, the rest in int4-g32."""
    if answer is None:
        return unanswered("a number of bits per weight")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    low = QuantScheme.parse("int4-g32").bits_per_weight((256, 256))
    wanted = 16 * IN_EXPERTS + low * (1 - IN_EXPERTS)
    if abs(x[0] - wanted) <= 2e-3:
        return right(f"0.8 * 16 + 0.2 * 4.5 = {wanted:.1f} bits. With the experts in int4-g32 as well it would be 4.5")
    hints = {
        16 * IN_EXPERTS + 4 * (1 - IN_EXPERTS): "int4-g32 takes more than 4 bits: 32 weights share a scale of 16",
        low: "that would be so if all weights were in int4-g32; the experts are not",
        low * IN_EXPERTS + 16 * (1 - IN_EXPERTS): "the other way round: the experts are what was skipped",
        (16 + low) / 2: "the two kinds are not equally many: weigh each with its share",
        16 * (1 - IN_EXPERTS) + 4 * IN_EXPERTS: "the other way round: the experts are what was skipped",
    }
    return hint(x[0], hints, "a mean of two kinds of weights, each with its share of all")


def check_kl(answer) -> Verdict:
    """01, exercise 2: KL(`BEFORE` || `AFTER`) in nats."""
    if answer is None:
        return unanswered("a number of nats")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    p, q = np.array(BEFORE), np.array(AFTER)
    wanted = float(np.sum(p * np.log(p / q)))
    if abs(x[0] - wanted) <= 4e-4:
        return right(
            f"0.7 ln(7/6) + 0.2 ln(2/3) + 0.1 ln 1 = {wanted:.4f} nats. The likeliest word is the same, and KL has noticed all the same"
        )
    hints = {
        float(np.sum(q * np.log(q / p))): "that is KL(compressed || original): the original's probabilities weigh the terms",
        wanted / math.log(2): "these are bits; take natural logarithms for nats",
        float(np.sum(np.log(p / q))): "each term is weighed with the original's probability",
        float(np.sum(p * np.abs(np.log(p / q)))): "terms keep their sign: a word that became likelier counts against the others",
        float(np.sum(np.abs(p - q))): "that is the sum of differences; KL takes logarithms of ratios",
        -wanted: "the sign: it is ln(original / compressed), and a divergence is never negative",
    }
    return hint(x[0], hints, "sum p ln(p / q) over the three words, p of the original", 4e-4)


def check_dequantize(answer) -> Verdict:
    """01, exercise 3: a function (codes uint8 [out, in], scales [out, groups], bits) -> weights float [out, in]."""

    def twin(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
        size = codes.shape[1] // scales.shape[1]
        scheme = QuantScheme.parse(f"int{bits}-{'row' if scales.shape[1] == 1 else f'g{size}'}")
        return QTensor.from_codes(codes, scales.astype(np.float16), scheme).dequantize()

    r = np.random.default_rng(0)

    def drawn(bits: int, out: int, n: int, groups: int) -> tuple:
        return r.integers(0, 2**bits, (out, n), np.uint8), r.uniform(-1, 1, (out, groups)).astype(np.float16).astype(np.float32), bits

    above = np.array([[9, 15, 8, 12]], np.uint8), np.array([[0.5]], np.float32), 4
    below = np.array([[8, 3, 0, 15]], np.uint8), np.array([[0.5]], np.float32), 4
    cases = [
        Case("four codes of 4 bits, none below the middle", above, "the code 2^(bits - 1) stands for zero"),
        Case("codes below the middle", below, "a uint8 knows no numbers below zero: 3 - 8 is 251. Make floats of the codes first"),
        Case("two rows with a scale each", drawn(4, 2, 8, 1), "each row has its own scale"),
        Case("rows of three groups", drawn(4, 2, 96, 3), "scales[:, 0] belongs to the first 32 inputs, scales[:, 1] to the next"),
        Case("3 bits", drawn(3, 3, 64, 2), "the middle of eight codes is 4"),
        Case("8 bits", drawn(8, 2, 64, 1), "the middle of 256 codes is 128"),
    ]
    form = "a function of codes, scales and bits that returns the weights, an array of the codes' shape"
    praise = "this is what every runtime does with such a file, and a good one without ever storing the result (notebook 02)"
    return check_function(answer, twin, cases, form, praise, parts=("weights",), tolerance=1e-5)
