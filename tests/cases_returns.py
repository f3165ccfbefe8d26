"""Rows of the contract's table for log-probs, KL, rewards and returns, and what laws draw from."""

from functools import partial

import torch
from cases_ground import array, masks, real
from hypothesis import strategies as st

from rlhf_fn import kl, logprobs, returns, rewards
from rlhf_fn.linear import linear_token_logprobs, linear_token_logprobs_and_entropy

VOCAB = 5
WEIGHT, BIAS = torch.arange(VOCAB * 4.0).reshape(VOCAB, 4).sin(), torch.arange(VOCAB * 1.0).cos()

unit = st.floats(0, 1)


def keep(*shape):
    mask = torch.rand(*shape) > 0.3
    mask[..., 0, :2] = torch.tensor([False, True])  # something hidden, and something kept
    return mask


def ids(*shape):
    return torch.randint(0, VOCAB, shape)


@st.composite
def trajectories(draw, count=2, batch=3, time=9):
    """`count` float64 tensors, a mask and a bootstrap value per row; ragged, with empty rows."""
    shape = draw(st.integers(1, batch)), draw(st.integers(1, time))
    tensors = [draw(array(*shape)) for _ in range(count)]
    return *tensors, draw(masks(*shape)), draw(array(shape[0]))


def _linear(hidden, tokens):
    weight, bias = WEIGHT.to(hidden), BIAS.to(hidden)
    return linear_token_logprobs(hidden, weight, tokens, bias, temperature=0.7, chunk=2)


def _linear_and_entropy(hidden, tokens):
    weight, bias = WEIGHT.to(hidden), BIAS.to(hidden)
    return linear_token_logprobs_and_entropy(hidden, weight, tokens, bias, temperature=0.7, chunk=2)


_vtrace = {"discount": 0.97, "lam": 0.9, "clip_rho": 1.5, "clip_c": 1.1}

CASES = {
    "token_logprobs": (
        partial(logprobs.token_logprobs, temperature=0.7),
        lambda: (real(3, 7, VOCAB), ids(3, 7)),
    ),
    "cross_entropy": (logprobs.cross_entropy, lambda: (real(3, 7, VOCAB), ids(3, 7))),
    "entropy": (partial(logprobs.entropy, temperature=0.7), lambda: (real(3, 7, VOCAB),)),
    "full_kl": (logprobs.full_kl, lambda: (real(3, 7, VOCAB), real(3, 7, VOCAB))),
    "linear_token_logprobs": (_linear, lambda: (real(3, 7, 4), ids(3, 7))),
    "linear_token_logprobs_and_entropy": (
        _linear_and_entropy,
        lambda: (real(3, 7, 4), ids(3, 7)),
    ),
    "k1": (kl.k1, lambda: (real(3, 7), real(3, 7))),
    "k2": (kl.k2, lambda: (real(3, 7), real(3, 7))),
    "k3": (kl.k3, lambda: (real(3, 7), real(3, 7))),
    # a law of the table is that nothing returns its own argument: here that is the whole function
    "fixed_kl": (
        lambda coef, measured: kl.fixed_kl(coef, measured, tokens=100).clone(),
        lambda: (real(3), real(3)),
    ),
    "adaptive_kl": (
        partial(kl.adaptive_kl, target=5.0, horizon=1000.0, tokens=100.0),
        lambda: (real(3), 5 + real(3) / 4),
    ),
    "mixture_logprobs": (
        partial(kl.mixture_logprobs, weight=0.3),
        lambda: (real(3, 7), real(3, 7)),
    ),
    "geometric_mixture_logprobs": (
        partial(kl.geometric_mixture_logprobs, weight=0.3),
        lambda: (real(3, VOCAB), real(3, VOCAB)),
    ),
    "gae": (
        partial(returns.gae, discount=0.97, lam=0.9),
        lambda: (real(3, 7), real(3, 7), keep(3, 7)),
    ),
    "td_error": (
        partial(returns.td_error, discount=0.97),
        lambda: (real(3, 7), real(3, 7), keep(3, 7)),
    ),
    "discounted_returns": (
        partial(returns.discounted_returns, discount=0.97),
        lambda: (real(3, 7), keep(3, 7)),
    ),
    "lambda_returns": (
        partial(returns.lambda_returns, discount=0.97, lam=0.9),
        lambda: (real(3, 7), real(3, 7), keep(3, 7)),
    ),
    "q_learning_error": (
        partial(returns.q_learning_error, discount=0.97),
        lambda: (real(3, 7, VOCAB), real(3, 7, VOCAB), ids(3, 7), real(3, 7), keep(3, 7)),
    ),
    "vtrace": (
        partial(returns.vtrace, **_vtrace),
        lambda: (*(real(3, 7) for _ in range(4)), keep(3, 7)),
    ),
    "shape_rewards": (
        partial(rewards.shape_rewards, beta=0.1),
        lambda: (real(3), real(3, 7), real(3, 7), keep(3, 7)),
    ),
    "last_token_reward": (rewards.last_token_reward, lambda: (real(3), keep(3, 7))),
    "uniform_reward": (rewards.uniform_reward, lambda: (real(3), keep(3, 7))),
    "discounted_reward": (
        partial(rewards.discounted_reward, discount=0.9),
        lambda: (real(3), keep(3, 7)),
    ),
    "whiten": (
        partial(rewards.whiten, eps=1e-8, shift_mean=True),
        lambda: (real(3, 7), keep(3, 7)),
    ),
}
