"""Reference policies that move: the parameters that the next reference has. Trees in, trees out.

A reference may also be the policy that sampled (`old_logprobs`), or a mixture of two by their
log-probs (`mixture_logprobs`, `geometric_mixture_logprobs`).
"""

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.tree import Tree


def soft_update(ref_params: Tree, params: Tree, *, rate: float | Tensor) -> Tree:
    """π_ref ← (1 − α) π_ref + α π, leaf by leaf: TR-DPO's soft update; an EMA of decay 1 − α.

    Raises: ValueError unless the structures agree and 0 ≤ α ≤ 1.

    Gorbatovski et al. 2024: https://arxiv.org/abs/2404.09656
    """
    checks.unit_interval(rate=rate)
    return tree.map(lambda old, new: old + tree.cast(rate, old) * (new - old), ref_params, params)


def periodic_update(
    ref_params: Tree, params: Tree, *, step: int | Int[Tensor, ""], every: int
) -> Tree:
    """π_ref ← π at every step that `every` divides, else as it was: TR-DPO's hard update.

    Raises: ValueError unless the structures agree and `every` ≥ 1.

    Gorbatovski et al. 2024: https://arxiv.org/abs/2404.09656
    """
    checks.count(least=1, every=every)
    now = torch.as_tensor(step % every == 0)
    return tree.map(lambda old, new: torch.where(now.to(old.device), new, old), ref_params, params)
