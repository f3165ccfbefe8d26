"""Wrong arguments of the arithmetic: each is named, and nothing broadcasts in silence."""

import math

import pytest
import torch
from cases_losses import refused

from rlhf_fn import (
    bradley_terry,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    cross_entropy,
    discounted_returns,
    discounted_reward,
    dpo,
    entropy,
    entropy_bonus,
    explained_variance,
    full_kl,
    gae,
    geometric_mixture_logprobs,
    grpo_advantages,
    implicit_reward,
    k1,
    k2,
    k3,
    lambda_returns,
    last_token_reward,
    mixture_logprobs,
    pairwise_token_loss,
    policy_gradient,
    q_learning_error,
    shape_rewards,
    td_error,
    token_logprobs,
    uniform_reward,
    value_loss,
    vtrace,
    weighted_sum,
    whiten,
)
from rlhf_fn.checks import NonFiniteError

X, ROW, BATCH = torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)
WHOLE, PART = torch.ones(2, 3) == 1, torch.tensor([[True, False, True], [False] * 3])
TOKENS, LOGITS, INTS = torch.ones(2, 3).long(), torch.zeros(2, 3, 5), torch.ones(2, 3).long()
COLUMN, DEEP = torch.ones(2, 1), torch.ones(2, 1, 1)
NAN = torch.tensor([[0.0, 0.0, math.nan], [0.0] * 3])
CLIP, DISCOUNT, RATES = (
    {"clip_low": 0.2, "clip_high": 0.2},
    {"discount": 1.0},
    {"discount": 1.0, "lam": 0.9},
)
VTRACE = RATES | {"clip_rho": 1.0, "clip_c": 1.0}

SHAPES = {  # what would broadcast
    "logprobs of a row": (lambda: clipped_surrogate(X, ROW, X, **CLIP), "old_logprobs"),
    "advantages of a batch": (lambda: policy_gradient(X, BATCH), "advantages"),
    "advantages of a row": (lambda: clip_fraction(X, X, ROW, **CLIP), "advantages"),
    "values of a column": (lambda: value_loss(X, COLUMN), "returns"),
    "old values of a row": (lambda: clipped_value_loss(X, ROW, X, clip=0.2), "old_values"),
    "a mask transposed": (lambda: gae(X, X, WHOLE.T, **RATES), "mask"),
    "a mask of a row": (lambda: whiten(X, WHOLE[0], eps=1e-8, shift_mean=True), "mask"),
    "a mask for the variance": (lambda: explained_variance(X, X, WHOLE[:1]), "mask"),
    "scores of a column": (lambda: last_token_reward(COLUMN, WHOLE), "score"),
    "scores of a token": (lambda: uniform_reward(X, WHOLE), "score"),
    "ids of a row": (lambda: token_logprobs(LOGITS, TOKENS[0]), "tokens"),
    "weights of a row": (lambda: weighted_sum(X, ROW), "weights"),
    "reference logits of a row": (lambda: full_kl(LOGITS, LOGITS[0]), "ref_logits"),
    "a margin of a column": (lambda: bradley_terry(BATCH, BATCH, margin=COLUMN), "margin"),
    "a beta of a column": (lambda: implicit_reward(BATCH, BATCH, beta=COLUMN), "beta"),
    "a smoothing of a column": (
        lambda: dpo(BATCH, BATCH, BATCH, BATCH, beta=0.1, label_smoothing=COLUMN / 9),
        "label_smoothing",
    ),
    "a clip too deep": (lambda: clipped_surrogate(X, X, X, clip_low=DEEP, clip_high=1), "clip_low"),
    "a clip of a batch": (lambda: clip_fraction(X, X, X, clip_low=1, clip_high=BATCH), "clip_high"),
    "a value clip too deep": (lambda: clipped_value_loss(X, X, X, clip=DEEP), "clip"),
    "a coefficient too deep": (lambda: entropy_bonus(X, coef=DEEP), "coef"),
    "a discount too deep": (lambda: td_error(X, X, WHOLE, discount=DEEP), "discount"),
    "a lambda of a batch": (lambda: lambda_returns(X, X, WHOLE, discount=1.0, lam=BATCH), "lam"),
    "a kl coefficient too deep": (lambda: shape_rewards(BATCH, X, X, WHOLE, beta=DEEP), "beta"),
    "a reward's discount": (lambda: discounted_reward(BATCH, WHOLE, discount=DEEP), "discount"),
    "a mixture's weight": (lambda: mixture_logprobs(X, X, weight=DEEP), "weight"),
    "a geometric weight": (lambda: geometric_mixture_logprobs(X, X, weight=DEEP), "weight"),
    "an importance clip": (
        lambda: vtrace(X, X, X, X, WHOLE, **VTRACE | {"clip_c": DEEP}), "clip_c"
    ),
}  # fmt: skip

DTYPES = {
    "integer logits": (lambda: token_logprobs(LOGITS.long(), TOKENS), "logits must be floating"),
    "bool logits": (lambda: entropy(LOGITS == 0), "logits must be floating"),
    "float ids": (lambda: cross_entropy(LOGITS, X), "tokens must hold integers"),
    "bool ids": (lambda: token_logprobs(LOGITS, WHOLE), "tokens must hold integers"),
    "integer rewards": (lambda: gae(INTS, X, WHOLE, **RATES), "rewards must be floating"),
    "bool rewards": (lambda: discounted_returns(WHOLE, WHOLE, **DISCOUNT), "rewards must be float"),
    "integer values": (lambda: td_error(X, INTS, WHOLE, **DISCOUNT), "values must be floating"),
    "integer scores": (lambda: last_token_reward(INTS[:, 0], WHOLE), "score must be floating"),
    "integer group rewards": (
        lambda: grpo_advantages(INTS, ddof=1, eps=0.1),
        "rewards must be floating",
    ),
    "a mask as advantages": (lambda: policy_gradient(X, WHOLE), "advantages must be floating"),
    "a mask as weights": (lambda: weighted_sum(X, WHOLE), "weights must be floating"),
    "advantages as a mask": (lambda: gae(X, X, X, **RATES), "mask must be torch.bool"),
    "ones as a mask": (lambda: explained_variance(X, X, INTS), "mask must be torch.bool"),
    "float actions": (lambda: q_learning_error(LOGITS, LOGITS, X, X, WHOLE, **DISCOUNT), "actions"),
    "float answers": (
        lambda: pairwise_token_loss(X, X, X, TOKENS, WHOLE, WHOLE), "chosen_tokens must hold"
    ),
    "integer old log-probs": (
        lambda: clipped_surrogate(X, INTS, X, **CLIP), "old_logprobs must be floating"
    ),
    "integer log-probs": (lambda: vtrace(INTS, X, X, X, WHOLE, **VTRACE), "logprobs must be float"),
    "integer preferences": (lambda: bradley_terry(INTS, INTS), "chosen must be floating"),
    "integer returns": (lambda: value_loss(X, INTS), "returns must be floating"),
} | {
    f"integers in {k.__name__}": (lambda k=k: k(X, INTS), "ref_logprobs must be floating")
    for k in (k1, k2, k3)
}  # fmt: skip

VALUES = {
    "an id beyond the vocabulary": (lambda: token_logprobs(LOGITS, TOKENS * 5), r"tokens\[0, 0\]"),
    "a negative id": (lambda: cross_entropy(LOGITS, -TOKENS), r"tokens\[0, 0\] is -1"),
    "a NaN reward": (lambda: gae(NAN, X, WHOLE, **RATES), r"rewards\[0, 2\] is nan"),
    "an infinite reward": (
        lambda: lambda_returns(1 / NAN, X, PART, **RATES), r"rewards\[0, 0\] is inf"
    ),
    "a NaN score": (lambda: last_token_reward(NAN[0, 1:], WHOLE), r"score\[1\] is nan"),
    "a NaN in a group": (lambda: grpo_advantages(NAN, ddof=1, eps=0.1), r"rewards\[0, 2\] is nan"),
    "a group of one": (lambda: grpo_advantages(COLUMN, ddof=1, eps=0.1), "2 samples or more"),
    "a negative group eps": (lambda: grpo_advantages(X, ddof=1, eps=-0.1), "eps must be"),
    "lambda above 1": (lambda: gae(X, X, WHOLE, discount=1.0, lam=1.1), "lam must be"),
    "lambda below 0": (lambda: vtrace(X, X, X, X, WHOLE, **VTRACE | {"lam": -0.1}), "lam must be"),
    "a NaN discount": (lambda: td_error(X, X, WHOLE, discount=math.nan), "discount must be"),
    "no temperature": (lambda: token_logprobs(LOGITS, TOKENS, temperature=0.0), "temperature"),
    "a negative temperature": (lambda: entropy(LOGITS, temperature=-1.0), "temperature"),
    "half the labels flipped": (
        lambda: dpo(X, X, X, X, beta=0.1, label_smoothing=0.5), "label_smoothing must be .*1/2"
    ),
    "a negative clip": (lambda: clipped_surrogate(X, X, X, clip_low=-0.1, clip_high=1), "clip_low"),
    "a NaN clip": (lambda: clip_fraction(X, X, X, clip_low=1, clip_high=math.nan), "clip_high"),
    "a negative value clip": (lambda: clipped_value_loss(X, X, X, clip=-1.0), "clip must be"),
    "a negative kl coefficient": (lambda: shape_rewards(BATCH, X, X, WHOLE, beta=-1.0), "beta"),
    "no eps": (lambda: whiten(X, WHOLE, eps=0.0, shift_mean=True), "eps must be"),
    "a mixture's weight": (lambda: mixture_logprobs(X, X, weight=1.5), "weight must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_what_would_broadcast_is_refused(what):
    call, name = SHAPES[what]
    with refused(name):
        call()


@pytest.mark.parametrize("what", DTYPES)
def test_a_wrong_dtype_is_refused(what):
    call, says = DTYPES[what]
    with refused(says, TypeError):
        call()


@pytest.mark.parametrize("what", VALUES)
def test_a_wrong_value_is_refused(what):
    call, says = VALUES[what]
    with refused(says) as caught:
        call()
    assert isinstance(caught.value, NonFiniteError) == says.endswith((" is nan", " is inf"))


def test_what_the_mask_hides_and_what_a_mask_hides_whole_are_no_misuse():
    assert not gae(NAN, X, PART & NAN.isfinite(), **RATES).advantages.any()
    assert not lambda_returns(NAN, NAN, WHOLE & False, **RATES).any()
    assert not last_token_reward(NAN[0, 1:], PART).any()
    assert not whiten(NAN, WHOLE & False, eps=1e-8, shift_mean=True).any()


def test_a_hyperparameter_may_be_a_tensor_that_fits():
    each = {"clip_low": COLUMN, "clip_high": X.new_tensor(math.inf)}
    one = {"clip_low": 1.0, "clip_high": math.inf}
    x = torch.randn(2, 3)
    assert clipped_surrogate(x, X, x, **each).equal(clipped_surrogate(x, X, x, **one))
    assert gae(x, x, WHOLE, discount=COLUMN, lam=X.new_tensor(0.9))[0].equal(
        gae(x, x, WHOLE, discount=1.0, lam=0.9)[0]
    )
