"""TRL's policy losses against ours on the same ragged rows: the same values and gradients.

TRL's own code runs (1.16 is what was compared with); it is no dependency.
"""

import math
from types import SimpleNamespace

import pytest

pytest.importorskip(
    "trl", minversion="1.16", reason="compared with TRL where it is installed: pip install trl"
)

from agreement import ROWS, completions, difference, ragged, scored, trainer  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOTrainer  # noqa: E402

import rlhf_fn as fn  # noqa: E402

SAME = 1e-5
LENGTH = 16  # the generation budget of Dr. GRPO
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
SOFT = {"temperature_positive": 1.0, "temperature_negative": 1.05}
FADING = {"k_positive": 2.0, "lam_positive": 3.0, "k_negative": 3.0, "lam_negative": 2.0}


def ppo(x):
    return fn.clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages[:, None], **CLIP)


def gspo(x):
    return fn.gspo(x.logprobs, x.old_logprobs, x.advantages[:, None], x.mask, **CLIP)


def cispo(x, clip_high=4.0):
    fields = x.logprobs, x.old_logprobs, x.advantages[:, None]
    return fn.cispo(*fields, clip_low=math.inf, clip_high=clip_high)


def two_sided(x, delta=1.5, clip_high=0.28):
    fields = x.logprobs, x.old_logprobs, x.advantages[:, None]
    return fn.dual_clipped_surrogate(*fields, clip_low=0.2, clip_high=clip_high, dual_clip=delta)


def sapo(x):
    return fn.sapo(x.logprobs, x.old_logprobs, x.advantages[:, None], **SOFT)


def penalised(x):
    return ppo(x) + 0.04 * fn.k3(x.logprobs, x.ref_logprobs)


def corrected(x):
    return ppo(x) + 0.04 * fn.off_policy_kl(x.logprobs, x.old_logprobs, x.ref_logprobs)


def exploring(x):
    return ppo(x) + fn.entropy_bonus(x.entropy, coef=0.01)


def vespo(x):
    return fn.vespo(x.logprobs, x.old_logprobs, x.advantages[:, None], x.mask, **FADING)


def budget(mask):
    return fn.fixed_length(mask, length=LENGTH)


def total(per_token, weights):
    """Our loss of rows, from a loss per token and a reduction."""
    return lambda x: fn.weighted_sum(per_token(x), weights(x.mask))


def off_policy(x):
    keep = fn.off_policy_sequence_mask(
        x.logprobs.detach(), x.old_logprobs, x.advantages[:, None], x.mask, limit=0.1
    )
    return fn.weighted_sum(ppo(x), fn.sequence_mean(x.mask) * keep)


def highest(rows, fraction):
    kept = fn.top_fraction(rows.entropy, rows.mask, fraction=fraction)
    return fn.weighted_sum(ppo(rows), fn.token_mean(rows.mask) * kept)


BY_ANSWER = {"importance_sampling_level": "sequence"}
PENALTY = {"loss_type": "dapo", "beta": 0.04}
# what TRL's GRPOTrainer is set to -> what the same loss is here
POLICY = {
    "grpo": ({}, total(ppo, fn.sequence_mean)),
    "bnpo": ({"loss_type": "bnpo"}, total(ppo, fn.token_mean)),
    "dapo": ({"loss_type": "dapo"}, total(ppo, fn.token_mean)),
    "dr_grpo": ({"loss_type": "dr_grpo"}, total(ppo, budget)),
    "grpo, ratio of answers": (BY_ANSWER, total(gspo, fn.sequence_mean)),
    "luspo": ({"loss_type": "luspo"} | BY_ANSWER, total(gspo, fn.sequence_sum)),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, total(cispo, fn.token_mean)),
    "sapo": ({"loss_type": "sapo"}, total(sapo, fn.sequence_mean)),
    "vespo": ({"loss_type": "vespo"}, total(vespo, fn.token_mean)),
    "two-sided clip": ({"delta": 1.5}, total(two_sided, fn.sequence_mean)),
    "k3 penalty": (PENALTY, total(penalised, fn.token_mean)),
    "k3 penalty, corrected": (
        PENALTY | {"use_bias_correction_kl": True},
        total(corrected, fn.token_mean),
    ),
    "off-policy sequence mask": ({"off_policy_mask_threshold": 0.1}, off_policy),
    "the tokens of highest entropy": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.2},
        lambda x: highest(x, 0.2),
    ),
    "entropy bonus": (
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.01},
        total(exploring, fn.token_mean),
    ),
}


def grpo(rows, kind=GRPOTrainer, **settings):
    """The loss of TRL's GRPOTrainer, or of one derived from it, for these rows."""
    args = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1, "report_to": [],
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
    }  # fmt: skip
    own = {name: settings.pop(name) for name in args.keys() & settings.keys()}
    common = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "use_vllm": False,
        "epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": LENGTH,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    made = trainer(kind, args=SimpleNamespace(**args | own), **common | settings)
    return made._compute_loss(scored(rows), completions(rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", POLICY)
def test_a_policy_loss_is_that_of_trl(name, seed):
    settings, ours = POLICY[name]
    rows = ragged(seed, holes=True)
    theirs = grpo(rows, **settings)
    assert difference(theirs, ours(rows), rows.logprobs, rows.entropy) < SAME


@pytest.mark.parametrize("seed", range(5))
def test_gmpo_is_that_of_trl(seed):
    rows = ragged(seed, holes=True)
    theirs = grpo(rows, GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4)
    fields = rows.logprobs, rows.old_logprobs, rows.advantages[:, None], rows.mask
    ours = fn.weighted_sum(
        fn.gmpo(*fields, clip_low=0.4, clip_high=0.4), fn.sequence_mean(rows.mask)
    )
    assert difference(theirs, ours, rows.logprobs) < SAME


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_rloo_is_that_of_trl(seed):
    rows = ragged(seed)
    close = rows._replace(old_logprobs=rows.logprobs.detach() + 0.1 * (rows.old_logprobs + 1.5))
    made = trainer(RLOOTrainer, epsilon_low=0.2, epsilon_high=0.28)
    old = fn.masked_sum(close.old_logprobs, close.mask)
    theirs = made._compute_loss(scored(close), completions(close, old_logps=old))
    whole = fn.masked_sum(close.logprobs, close.mask)[:, None], old[:, None]
    ours = fn.clipped_surrogate(*whole, close.advantages[:, None], **CLIP).mean()
    assert difference(theirs, ours, rows.logprobs) < SAME


def halves(rows):
    return (type(rows)(*(x[part] for x in rows)) for part in (slice(0, 4), slice(4, ROWS)))


def below(fraction, rows):
    """A share of these tokens that is 1 + ⌊f (n − 1)⌋ of them."""
    number = rows.mask.sum().item()
    return (math.floor(fraction * (number - 1)) + 0.5) / number


# what differs -> (why, their loss of rows, ours with the same setting, ours that is theirs)
DIFFERENCES = {
    "rows without a token": (
        "they count in TRL's number of rows; here a row with no kept token is padding",
        lambda x: grpo(x),
        lambda x: total(ppo, fn.sequence_mean)(x),
        lambda x: total(ppo, fn.sequence_mean)(x) * x.mask.any(-1).sum() / ROWS,
    ),
    "parts of a batch": (
        "BNPO averages over each part by itself; here weights are of the whole batch, so that no "
        "result depends on how it is split",
        lambda x: sum(grpo(part, loss_type="bnpo") for part in halves(x)) / 2,
        lambda x: total(ppo, fn.token_mean)(x),
        lambda x: sum(total(ppo, fn.token_mean)(part) for part in halves(x)) / 2,
    ),
    "the bound of cispo": (
        "TRL's epsilon_high is the largest weight itself; here that is 1 + clip_high, the paper's",
        lambda x: grpo(x, loss_type="cispo", epsilon_high=2.0),
        lambda x: total(lambda y: cispo(y, clip_high=2.0), fn.token_mean)(x),
        lambda x: total(lambda y: cispo(y, clip_high=1.0), fn.token_mean)(x),
    ),
    "a delta within the clip": (
        "below 1 + clip_high TRL's delta bounds good tokens, and bad ones are bounded by the "
        "latter; here dual_clip bounds bad tokens and no others",
        lambda x: grpo(x, delta=1.1),
        lambda x: total(lambda y: two_sided(y, delta=1.1), fn.sequence_mean)(x),
        lambda x: total(lambda y: two_sided(y, 1.28, clip_high=0.1), fn.sequence_mean)(x),
    ),
    "a fraction that is no number of tokens": (
        "TRL takes a quantile between two tokens as the bound, 1 + ⌊f (n − 1)⌋ tokens; here the "
        "tokens that less than the share f surpass, ⌈f n⌉",
        lambda x: grpo(x, loss_type="dapo", top_entropy_quantile=0.94),
        lambda x: highest(x, 0.94),
        lambda x: highest(x, below(0.94, x)),
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_a_policy_loss_differs_from_trl_it_differs_by_what_is_said(name):
    why, theirs, ours, reconciled = DIFFERENCES[name]
    rows = ragged(3, empty=name.startswith("rows"))
    assert difference(theirs(rows), ours(rows), rows.logprobs) > 100 * SAME, why
    assert difference(theirs(rows), reconciled(rows), rows.logprobs) < SAME, why
