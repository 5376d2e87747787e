"""How many of its chosen experts a token really needs: pure functions on the gates [tokens, k] that a router gave.

A router hands on k experts per token, whatever their gates. Two rules leave some of them out, token by token:

- top-p (Huang et al., arXiv 2403.07652, section 3): the fewest experts whose gates add up to a share p of all;
- skipping (Lu et al., NAEE, arXiv 2402.14800, section 3.3): an expert whose gate is below beta times the largest.

"All" are the k gates given here. With k = all experts that is the paper's rule; with k small, a share of what the layer
would have summed. Both always keep the largest gate. What stays is scaled so that the gates' sum is as before: for
a router that normalises its gates, that is normalising over those that stay (its scaling factor included).
"""

import torch
from torch import Tensor


def nucleus(gates: Tensor, p: float) -> Tensor:
    """bool [tokens, k]: the fewest of a token's largest gates [tokens, k] whose sum is at least p of all; ties: the first.

    >>> nucleus(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]), 0.7)
    tensor([[False,  True,  True],
            [False,  True, False]])
    """
    ordered, order = gates.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what is reached without this one
    needed = before < p * ordered.sum(-1, keepdim=True) * (1 - 1e-7)  # float32 gates: .5 + .2 may be a little less than .7
    needed[..., 0] = True
    return torch.zeros_like(needed).scatter_(-1, order, needed)


def near_best(gates: Tensor, beta: float) -> Tensor:
    """bool [tokens, k]: the gates that are at least beta times the token's largest.

    >>> near_best(torch.tensor([[0.6, 0.2, 0.3]]), 0.5)
    tensor([[ True, False,  True]])
    """
    return gates >= beta * gates.amax(-1, keepdim=True)


def without(gates: Tensor, kept: Tensor, renormalise: bool = True) -> Tensor:
    """The gates [tokens, k] with those outside of `kept` bool [tokens, k] at 0; renormalised: with the same sum as before.

    >>> without(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[True, True, False]]))
    tensor([[0.6667, 0.3333, 0.0000]])
    """
    left = torch.where(kept, gates, 0)
    if not renormalise:
        return left
    total = left.sum(-1, keepdim=True)
    return left * torch.where(total > 0, gates.sum(-1, keepdim=True) / total, 1)


def active(gates: Tensor) -> float:
    """Experts per token that count: the mean number of gates [tokens, k] other than 0.

    >>> active(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    1.5
    """
    return float((gates != 0).sum(-1).double().mean())
