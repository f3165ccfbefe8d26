"""The kinds of functions that there are laws for: how each is called, and which laws it has."""

from typing import Any, NamedTuple

import torch

from rlhf_fn import law_losses, law_numerics, law_preferences, law_returns
from rlhf_fn.strategies import logits, policies, trajectories
from rlhf_fn.trials import Broken, Law, Subject, law, on, show


class Kind(NamedTuple):
    """Functions that are called alike, and the laws that are true of what they are `about`."""

    takes: tuple[str, ...]
    gives: str
    about: str
    laws: tuple[Law, ...]
    requires: tuple[str, ...] = ()
    knows: tuple[str, ...] = ()

    @property
    def call(self) -> str:
        """How such a function is called, and what it gives back."""
        return f"f({', '.join(self.takes)}) -> {self.gives}"

    @property
    def settings(self) -> set[str]:
        """What may be said of such a function."""
        return {*self.requires, *self.knows, *(need for each in self.laws for need in each.needs)}


@law(
    known_from="OpenRLHF #857, verl #3133, NeMo-RL #316 (logits.div_(temperature))",
    given=logits(),
)
def pure(f: Subject, **case: Any) -> None:
    """It writes to none of its arguments."""
    args = list(case.values())
    before, versions = [x.clone() for x in args], [x._version for x in args]
    f.results(*args)
    for name, x, was, version in zip(case, args, before, versions):
        if x._version != version or not torch.equal(x, was):
            raise Broken(f"{name} was written to: it is {show(x)}, and was {show(was)}")


_TWO = trajectories("logprobs", "ref_logprobs").map(
    lambda case: {name: case[name] for name in ("logprobs", "ref_logprobs")}
)
_TOKENS = "per token or scalar"
_PAIRS = "per pair or scalar"
_KL = ("logprobs [batch, time]", "ref_logprobs"), "per token"
_POLICY = ("logprobs [batch, time]", "old_logprobs", "advantages", "mask"), _TOKENS
_REDUCE = ("per_token [batch, time]", "mask"), "scalar"
_PREFER = ("chosen log-probs [batch]", "rejected", "ref_chosen", "ref_rejected"), _PAIRS
_SCORES = ("chosen [batch]", "rejected"), _PAIRS
_kl_laws = *on(_TWO, pure), law_numerics.zero_at_equality, law_numerics.half_kl
_policy_laws = (
    *on(policies(), pure, *law_losses.HIDDEN),
    law_losses.reinforce_at_ratio_one,
)
_reduction_laws = on(law_losses.REDUCTION, pure, *law_losses.HIDDEN)
_preference_laws = (
    *on(law_preferences.FOUR, pure),
    law_preferences.common_cancels,
    law_preferences.points_the_right_way,
    law_preferences.extreme_answers,
)

KINDS: dict[str, Kind] = {
    "logprobs": Kind(
        ("logits [batch, time, vocab]", "tokens [batch, time]"),
        "[batch, time]",
        "log softmax(z/τ) at tokens that are aligned with their logits; τ is `temperature`, or 1",
        (
            pure,
            law_numerics.is_log_softmax,
            law_numerics.own_upstream_gradient,
            law_numerics.shifted_logprobs,
            law_numerics.banned_logprobs,
            law_numerics.half_logprobs,
        ),
        knows=("temperature",),
    ),
    "entropy": Kind(
        ("logits [batch, time, vocab]",),
        "[batch, time]",
        "-Σ π log π in nats, π = softmax(z/τ); τ is `temperature`, or 1",
        (
            *on(law_numerics.is_entropy.given, pure),
            law_numerics.is_entropy,
            law_numerics.shifted_entropy,
            law_numerics.banned_entropy,
            law_numerics.half_entropy,
        ),
        knows=("temperature",),
    ),
    "kl": Kind(
        *_KL,
        "unbiased estimates of KL(π ‖ π_ref) at tokens of π: for rewards and metrics",
        (*_kl_laws, law_numerics.mean_is_kl),
    ),
    "non-negative kl": Kind(
        *_KL,
        "those that are never negative, such as k3",
        (*_kl_laws, law_numerics.mean_is_kl, law_numerics.never_negative),
    ),
    "kl loss": Kind(
        *_KL,
        "terms of a loss whose gradient, on tokens of π, is that of KL(π ‖ π_ref), such as k2",
        (*_kl_laws, law_numerics.gradient_is_that_of_kl),
    ),
    "policy": Kind(
        *_POLICY,
        "losses with REINFORCE's gradient at ratio one, and no KL or entropy term; `clip_low` and "
        "`clip_high` say that it is clipped as PPO is",
        (*_policy_laws, law_losses.clip_takes_the_gradient),
    ),
    "cispo": Kind(
        *_POLICY,
        "policy losses that clip the weight of a token, not its gradient",
        (*_policy_laws, law_losses.clip_keeps_the_gradient),
    ),
    "value": Kind(
        ("values [batch, time]", "old_values", "returns", "mask"),
        _TOKENS,
        "losses of a value function; `clip` says that it is half a squared error, clipped around "
        "old_values (inf: not clipped)",
        (
            *on(law_losses.VALUE, pure, *law_losses.HIDDEN),
            law_losses.towards_the_return,
            law_losses.half_squared_error,
        ),
    ),
    "reduction": Kind(
        *_REDUCE, "any mean over what a mask keeps; the three below say which", _reduction_laws
    ),
    "token mean": Kind(
        *_REDUCE, "every token weighs the same", (*_reduction_laws, law_losses.is_token_mean)
    ),
    "sequence mean": Kind(
        *_REDUCE, "every row weighs the same", (*_reduction_laws, law_losses.is_sequence_mean)
    ),
    "sequence sum": Kind(
        *_REDUCE, "the mean over rows of their sums", (*_reduction_laws, law_losses.is_sequence_sum)
    ),
    "accumulation": Kind(
        ("[(per_token [batch, time], mask), ...]",),
        "the scalar loss of one optimizer step",
        "a loss over micro-batches that is the loss of the whole batch",
        (law_losses.split_changes_nothing, law_losses.empty_part),
    ),
    "rewards": Kind(
        ("score [batch]", "logprobs [batch, time]", "ref_logprobs", "mask"),
        "[batch, time]",
        "a score at the last kept token, less a penalty for leaving the reference",
        (
            *on(law_returns.SCORED, pure, *law_returns.HIDDEN),
            law_returns.pays_the_score,
            law_returns.drift_costs,
        ),
    ),
    "gae": Kind(
        ("rewards [batch, time]", "values", "mask"),
        "advantages or (advantages, returns)",
        "advantages, not whitened, of rows that end: V is 0 after the last kept token",
        (
            *on(law_returns.TRAJECTORIES, pure, *law_returns.HIDDEN),
            law_returns.is_gae,
            law_returns.cut_out,
            law_returns.returns_are_sums,
        ),
        requires=("discount", "lam"),
    ),
    "whiten": Kind(
        ("x [batch, time]", "mask"),
        "[batch, time]",
        "shifted to mean 0 and scaled to variance 1, by n or n - 1",
        (
            *on(law_returns.WHITEN, pure, *law_returns.HIDDEN),
            law_returns.is_white,
            law_returns.hidden_are_zero,
            law_returns.one_value,
            law_returns.far_from_zero,
        ),
    ),
    "group advantages": Kind(
        ("rewards [prompts, group]",),
        "[prompts, group]",
        "rewards above a baseline of their own group, scaled by it or not",
        (
            *on(law_returns.GROUPS, pure),
            law_returns.equal_rewards,
            law_returns.shifted_rewards,
            law_returns.prompts_apart,
            law_returns.bounded,
            law_returns.alone,
            law_returns.nan_reward,
        ),
    ),
    "preference": Kind(
        *_PREFER,
        "losses of log π/π_ref of two answers, that want the chosen one up",
        _preference_laws,
    ),
    "dpo": Kind(
        *_PREFER,
        "-log σ of `beta` times the difference of log π/π_ref",
        (*_preference_laws, law_preferences.log_two_at_the_reference, law_preferences.is_dpo),
    ),
    "reward loss": Kind(
        *_SCORES,
        "Bradley and Terry's: -log σ of the difference of two scores",
        (
            *on(law_preferences.TWO, pure),
            law_preferences.log_two_at_a_tie,
            law_preferences.swapped_scores,
            law_preferences.far_apart,
        ),
    ),
    "odds ratio": Kind(
        *_SCORES,
        "ORPO's, of mean log-probs of answers",
        (*on(law_preferences.TWO, pure), law_preferences.nearly_certain),
    ),
}
