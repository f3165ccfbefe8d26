"""Rows of the contract's table for advantages: groups, turns and MPO; and what laws draw from."""

from functools import partial

import torch
from cases_ground import array, finite, masks, positive, real
from cases_returns import keep
from hypothesis import strategies as st

from rlhf_fn import batch_advantages, groups, mpo, turns

shapes = st.tuples(st.integers(1, 3), st.integers(2, 8))


@st.composite
def ragged(draw, elements=finite):
    """Rewards of groups and which of them there are; empty groups and groups of one are common."""
    shape = draw(shapes)
    return draw(array(*shape, elements=elements)), draw(masks(*shape))


_scale = {"ddof": 1, "eps": 1e-4}


def group(f, **settings):
    return partial(f, **settings), lambda: (real(3, 5), keep(3, 5))


def turn(*shape):
    """A turn number per token: 0, 0, 1, 1, 1, 2, 2 and so on, each row of its own."""
    return (torch.rand(*shape) > 0.6).long().cumsum(-1)


CASES = {
    "grpo_advantages": group(groups.grpo_advantages, **_scale),
    "dr_grpo_advantages": group(groups.dr_grpo_advantages),
    "rloo_advantages": group(groups.rloo_advantages),
    "remax_advantages": (groups.remax_advantages, lambda: (real(3, 5), real(3))),
    "opo_advantages": (
        groups.opo_advantages,
        lambda: (real(3, 5), torch.randint(1, 9, (3, 5)), keep(3, 5)),
    ),
    "pass_at_k_advantages": group(groups.pass_at_k_advantages),
    "maxrl_advantages": (
        partial(groups.maxrl_advantages, eps=1e-4),
        lambda: (real(3, 5).abs(), keep(3, 5)),
    ),
    "lite_ppo_advantages": group(batch_advantages.lite_ppo_advantages, **_scale),
    "gdpo_advantages": (
        partial(batch_advantages.gdpo_advantages, weights=torch.tensor([0.7, 2.0]), **_scale),
        lambda: (real(3, 5, 2), keep(3, 5)),
    ),
    "reinforce_pp_advantages": (
        partial(batch_advantages.reinforce_pp_advantages, discount=0.97, eps=1e-8),
        lambda: (real(3, 7), keep(3, 7)),
    ),
    "reinforce_pp_baseline_advantages": (
        partial(batch_advantages.reinforce_pp_baseline_advantages, eps=1e-8),
        lambda: (real(3, 4), keep(3, 4, 7)),
    ),
    "informative_groups": group(groups.informative_groups),
    "turn_starts": (turns.turn_starts, lambda: (turn(3, 7), keep(3, 7))),
    "turn_sum": (turns.turn_sum, lambda: (real(3, 7), turn(3, 7), keep(3, 7))),
    "turn_gae": (
        partial(turns.turn_gae, discount=0.97, lam=0.9),
        lambda: (real(3, 7), real(3, 7), turn(3, 7), keep(3, 7)),
    ),
    "length_adaptive_lam": (
        partial(turns.length_adaptive_lam, alpha=0.5),
        lambda: (keep(3, 7),),
    ),
    "mpo_weights": group(mpo.mpo_weights, temperature=0.7),
    "mpo_temperature_loss": (
        partial(mpo.mpo_temperature_loss, bound=0.1),
        lambda: (positive(3), real(3, 5), keep(3, 5)),
    ),
    "kl_constraint": (partial(mpo.kl_constraint, bound=0.1), lambda: (positive(3), real(3).abs())),
}

WHOLE_BATCH = {
    "gdpo_advantages",
    "lite_ppo_advantages",
    "reinforce_pp_advantages",
    "reinforce_pp_baseline_advantages",
}
NO_GRADIENT = {"informative_groups", "turn_starts"}
STOP_GRADIENT = {"kl_constraint"}
FLOAT32_FROM_HALF = set()
