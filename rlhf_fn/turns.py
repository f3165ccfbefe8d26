"""Credit by turn, where an answer is several: the turn is the time step, not the token.

`turns` numbers the turn of each token; a turn is a run of kept tokens with one number, and hidden
tokens (what a tool or a user said) are stepped over.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.returns import Gae, gae
from rlhf_fn.scan import suffix_scan


def turn_starts(
    turns: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Bool[Tensor, "*batch time"]:
    """The first kept token of every turn.

    Raises: ValueError unless the shapes agree; TypeError unless turns are integers, the mask bool.
    """
    checks.same_shape(turns=turns, mask=mask)
    checks.integers(turns=turns)
    checks.bool_mask(mask)
    place = torch.arange(mask.shape[-1], device=mask.device)
    before = torch.where(mask, place, -1).cummax(-1).values.roll(1, -1)  # the last kept token
    first = (place == 0) | (before < 0)
    return mask & (first | (turns.gather(-1, before.clamp(min=0)) != turns))


def turn_sum(
    x: Float[Tensor, "*batch time"],
    turns: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """The sum of x over the kept tokens of a turn, at each of them; 0 where hidden.

    Raises: as `turn_starts`; ValueError unless x has the shape of the mask.
    """
    checks.same_shape(x=x, turns=turns, mask=mask)
    checks.floating(x=x)
    starts = turn_starts(turns, mask)
    ends = starts.roll(-1, -1)  # what stands before a start belongs to another turn
    to_go = suffix_scan(torch.where(mask, x, 0.0), torch.where(ends, 0.0, 1.0).to(x.dtype))
    return torch.where(mask, _held(to_go, starts), 0.0)


def turn_gae(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    turns: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    discount: float | Tensor,
    lam: float | Tensor,
    bootstrap: Float[Tensor, "*batch"] | None = None,
) -> Gae:
    """`gae` over turns: a turn's reward is the sum of its tokens', its value that of its first.

    δₖ = rₖ + γ Vₖ₊₁ − Vₖ,   Aₖ = δₖ + γλ Aₖ₊₁,   Rₖ = Aₖ + Vₖ, k a turn, at each of its tokens

    One turn per token is `gae`; one turn per answer its whole reward less its first value.

    Raises: as `gae` and `turn_starts`.

    Turn-level credit assignment, 2025: https://arxiv.org/abs/2505.11821
    """
    starts = turn_starts(turns, mask)
    steps = turn_sum(rewards, turns, mask)
    by_turn = gae(steps, values, starts, discount=discount, lam=lam, bootstrap=bootstrap)
    return Gae(*(torch.where(mask, _held(x, starts), 0.0) for x in by_turn))


def length_adaptive_lam(
    mask: Bool[Tensor, "*batch time"], *, alpha: float | Tensor, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch 1"]:
    """λ by the length of the answer, so that the whole of a long one sees its reward.

    λ = max(0, 1 − 1/(α l)), l the kept tokens of the row; the `lam` of `gae`, for the actor alone

    The Σₖ λᵏ of an endless answer is then α l.

    Raises: ValueError unless α > 0; TypeError for a mask that is not bool.

    VAPO, Yue et al. 2025: https://arxiv.org/abs/2504.05118
    """
    checks.bool_mask(mask)
    checks.positive(alpha=alpha)
    length = mask.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    return (1 - 1 / (alpha * length)).clamp(min=0)


def _held(x: Tensor, starts: Tensor) -> Tensor:
    """x at the last start up to here; 0 before the first."""
    place = torch.arange(x.shape[-1], device=x.device)
    last = torch.where(starts, place, -1).cummax(-1).values
    return torch.where(last >= 0, x.gather(-1, last.clamp(min=0)), 0.0)
