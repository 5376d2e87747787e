"""Losses by which a student learns from a teacher, on logits [..., vocabulary]. All are means over positions, in nats.

    p = softmax(teacher / T), q = softmax(student / T)

    forward   KL(p || q): cover all that the teacher says               Hinton et al., arXiv 1503.02531
    reverse   KL(q || p): say nothing that the teacher does not         MiniLLM, arXiv 2306.08543
    jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q    GKD, arXiv 2306.13649, section 3
    skew      KL(p || b p + (1 - b) q)                                  DistiLLM, arXiv 2402.03898, section 3

Gradients of a softened distribution shrink with 1 / T^2, so the divergence is multiplied by T^2 (1503.02531, section 2) and
weighs the same beside a cross entropy at every T.

**Reading the teacher once.** Its logits for a corpus are vocabulary x tokens numbers. Keeping the k largest is biased: what
is normalised over them says that the tail has no mass, and the student learns that. Tokens *drawn* from p estimate the cross
entropy -sum p log q without bias whatever their number (arXiv 2503.16870); k draws cost k small integers per position. The
KL divergence differs from it by the entropy of p alone, which the student can't change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("forward", "reverse", "jsd", "skew")


def divergence(student: Tensor, teacher: Tensor, *, loss: str = "forward", temperature: float = 1.0, beta: float = 0.1) -> Tensor:
    """T^2 D(teacher, student), averaged over positions: a scalar. Both logits [..., vocabulary]; `beta` is for "jsd" and "skew".

    Raises ValueError for an unknown loss, shapes that differ, a temperature that is not positive, beta outside of 0 .. 1.

    >>> teacher, student = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    >>> [round(float(divergence(student, teacher, loss=x, beta=0.5)), 4) for x in LOSSES]
    [0.1438, 0.1308, 0.0338, 0.0323]
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not known; use one of {', '.join(LOSSES)}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be logits of the same shape")
    if not temperature > 0 or not 0 <= beta <= 1:
        raise ValueError(f"temperature={temperature!r} must be above 0 and beta={beta!r} in 0 .. 1")
    p = torch.log_softmax(teacher.float().flatten(0, -2) / temperature, -1)
    q = torch.log_softmax(student.float().flatten(0, -2) / temperature, -1)
    match loss:
        case "forward":
            d = _kl(p, q)
        case "reverse":
            d = _kl(q, p)
        case "skew":
            d = _kl(p, _mixture(p, q, beta))
        case "jsd":
            m = _mixture(p, q, beta)
            d = beta * _kl(p, m) + (1 - beta) * _kl(q, m)
    return temperature**2 * d


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log probabilities [positions, vocabulary]; where p is 0 its term is, too."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean()


def _mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q) of log probabilities."""
    if beta in (0, 1):
        return p if beta else q
    return torch.logaddexp(p + torch.log(torch.tensor(beta)), q + torch.log(torch.tensor(1 - beta)))


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of predicting ids [B, T] one ahead, logits [B, T, vocabulary]: a scalar."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def hinton(student: Tensor, teacher: Tensor, ids: Tensor, *, temperature: float = 3.0, alpha: float = 0.7) -> Tensor:
    """alpha T^2 KL(p || q) + (1 - alpha) cross entropy on `ids` [B, T]; logits [B, T, vocabulary]. T = 3, alpha = 0.7: Open-AutoGLM."""
    return alpha * divergence(student, teacher, temperature=temperature) + (1 - alpha) * cross_entropy(student, ids)


# ----------------------------------------------------------------------------------------------------- hidden states


def layer_map(students: int, teachers: int) -> list[int]:
    """Which of the teacher's layers each of the student's learns from: spread evenly, the last from the last (PKD, 1908.09355).

    >>> layer_map(2, 4), layer_map(4, 2), layer_map(3, 3)
    ([1, 3], [0, 0, 1, 1], [0, 1, 2])
    """
    return [max(0, -(-(i + 1) * teachers // students) - 1) for i in range(students)]


def hidden_error(students: list[Tensor], teachers: list[Tensor], bridge=None) -> Tensor:
    """Mean squared error between hidden states [B, T, width], layers mapped evenly, each over the teacher's mean square.

    `bridge`: a module that turns the student's width into the teacher's, where they differ; ValueError without one.
    """
    total = 0.0
    for i, t in enumerate(layer_map(len(students), len(teachers))):
        s, want = students[i].float(), teachers[t].float()
        s = s if bridge is None else bridge(s)
        if s.shape != want.shape:
            raise ValueError(f"hidden states are {tuple(s.shape)} and {tuple(want.shape)}; widths that differ need a bridge")
        total = total + (s - want).square().mean() / want.square().mean().clamp(min=1e-12)
    return total / len(students)


# ------------------------------------------------------------------------------------------------------- kept logits


def draw(teacher: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """[..., samples] int32: tokens drawn from softmax(teacher) [..., vocabulary], what is kept of it."""
    p = torch.softmax(teacher.float(), -1)
    return torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator).view(*p.shape[:-1], samples).int()


def sampled_cross_entropy(student: Tensor, tokens: Tensor) -> Tensor:
    """Mean of -log q over drawn tokens [..., samples]: without bias the cross entropy -sum p log q of the teacher's p at T = 1."""
    return -torch.log_softmax(student.float(), -1).gather(-1, tokens.long()).mean()


def top_k_cross_entropy(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """What keeping the teacher's k largest probabilities, normalised, gives in its place: biased, the counter-example."""
    p, at = torch.softmax(teacher.float(), -1).topk(k)
    return -(p / p.sum(-1, keepdim=True) * torch.log_softmax(student.float(), -1).gather(-1, at)).sum(-1).mean()
