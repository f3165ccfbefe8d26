"""The losses' and the weights' rows of the contract's table, and what their laws draw from."""

import functools

import pytest
import torch
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_fn import policy, preference, value, weights

finite = st.floats(-5, 5, width=32, allow_subnormal=False)  # halving one is then exact


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def keep(*shape):
    return torch.rand(*shape) > 0.3


def word(*shape):
    return torch.randint(0, 3, shape)


def refused(says, error=ValueError):
    """Expect an error that says `says`; in the typed run the type checker may be there first."""
    return pytest.raises((error, TypeCheckError), match=f"{says}|Type-check error")


def array(*shape, elements=finite, dtype=torch.float64):
    """A strategy for tensors of one shape."""
    n = torch.Size(shape).numel()
    draws = st.lists(elements, min_size=n, max_size=n)
    return draws.map(lambda xs: torch.tensor(xs, dtype=dtype).reshape(shape))


def arrays(count, *, elements=finite, dtype=torch.float64, least=(1, 1), most=(3, 7)):
    """A strategy for `count` tensors that share a shape, between `least` and `most`."""
    shapes = st.tuples(*[st.integers(a, b) for a, b in zip(least, most)])
    one = functools.partial(array, elements=elements, dtype=dtype)
    return shapes.flatmap(lambda shape: st.tuples(*[one(*shape)] * count))


_clip = {"clip_low": 0.2, "clip_high": 0.28}

CASES = {
    "token_mean": (weights.token_mean, lambda: (keep(3, 7),)),
    "sequence_mean": (weights.sequence_mean, lambda: (keep(3, 7),)),
    "fixed_length": (functools.partial(weights.fixed_length, length=5), lambda: (keep(3, 7),)),
    "group_mean": (weights.group_mean, lambda: (keep(3, 4, 7),)),
    "weighted_sum": (weights.weighted_sum, lambda: (real(3, 7), real(3, 7))),
    "policy_gradient": (policy.policy_gradient, lambda: (real(3, 7), real(3, 1))),
    "clipped_surrogate": (
        functools.partial(policy.clipped_surrogate, **_clip),
        lambda: (real(3, 7), real(3, 7), real(3, 1)),
    ),
    "clip_fraction": (
        functools.partial(policy.clip_fraction, **_clip),
        lambda: (real(3, 7), real(3, 7), real(3, 7)),
    ),
    "approximate_kl": (policy.approximate_kl, lambda: (real(3, 7), real(3, 7))),
    "entropy_bonus": (
        functools.partial(policy.entropy_bonus, coef=0.01),
        lambda: (real(3, 7).abs(),),
    ),
    "value_loss": (value.value_loss, lambda: (real(3, 7), real(3, 7))),
    "clipped_value_loss": (
        functools.partial(value.clipped_value_loss, clip=0.2),
        lambda: (real(3, 7), real(3, 7), real(3, 7)),
    ),
    "explained_variance": (
        value.explained_variance,
        lambda: (real(3, 7), real(3, 7), keep(3, 7)),
    ),
    "bradley_terry": (
        functools.partial(preference.bradley_terry, margin=0.5),
        lambda: (real(3), real(3)),
    ),
    "pairwise_token_loss": (
        preference.pairwise_token_loss,
        lambda: (real(3, 7), real(3, 7), word(3, 7), word(3, 7), keep(3, 7), keep(3, 7)),
    ),
    "implicit_reward": (
        functools.partial(preference.implicit_reward, beta=0.1),
        lambda: (real(3), real(3)),
    ),
    "dpo": (
        functools.partial(preference.dpo, beta=0.1, label_smoothing=0.2),
        lambda: (real(3), real(3), real(3), real(3)),
    ),
}
