"""Laws of losses on pairs of answers: of a policy and its reference, and of a reward model."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fn.strategies import pairs
from rlhf_fn.trials import Broken, Subject, agree, finite, law, show

ANSWERS = "chosen", "rejected", "ref_chosen", "ref_rejected"
FOUR = pairs(*ANSWERS)
TWO = pairs("chosen", "rejected")
_EXTREME = [0.0, -1.0, -700.0, -4000.0]
_SCORES = [0.0, 1.0, 30.0, -30.0, 200.0, -200.0]
_SURE = [-1.0, -0.001, -1e-7, -1e-9, -30.0, -700.0]


def _is_mean_of(f: Subject, what: str, args: list[Tensor], per_pair: Tensor, **close: Any) -> None:
    """The loss is `per_pair`, or its mean if it is one number."""
    got = f(*args)
    agree(what, got, per_pair.mean() if got.ndim == 0 else per_pair, **close)


@law(
    known_from="TRL #495, #1340, #1534, #3194 (measured against another reference than was meant)",
    given=pairs(*ANSWERS, shift=st.sampled_from([1.0, -2.0, 16.0])),
)
def common_cancels(f, chosen, rejected, ref_chosen, ref_rejected, shift):
    """What policy and reference have in common cancels."""
    moved = f(chosen + shift, rejected, ref_chosen + shift, ref_rejected)
    agree(
        f"the chosen {shift:+g}, under both", moved, f(chosen, rejected, ref_chosen, ref_rejected)
    )


@law(
    known_from="tinker-cookbook #188 (log of a sigmoid that underflowed)",
    given=pairs(*ANSWERS, among=_EXTREME),
)
def extreme_answers(f, **case):
    """Extreme log-probs stay finite, forward and backward."""
    loss, slope = f.slope(*case.values())
    finite("the loss", loss)
    finite("the gradient", slope)


@law(
    known_from="open-unlearning #30 (a pair's loss overwritten by that of one answer)",
    given=FOUR,
)
def points_the_right_way(f, **case):
    """At the reference it pushes the chosen answer up and the rejected one down."""
    chosen, rejected, ref_chosen, ref_rejected = case.values()
    at_reference = ref_chosen, ref_rejected, ref_chosen.clone(), ref_rejected.clone()
    slope = f.slope(*at_reference)[1]
    other = Subject(lambda y, x, *ref: f._call(x, y, *ref)[0], {})
    away = other.slope(ref_rejected, ref_chosen, *at_reference[2:])[1]
    if not ((slope < 0).all() and (away > 0).all()):
        raise Broken(
            f"at the reference, the gradient of the chosen is {show(slope)}, expected < 0, and of "
            f"the rejected {show(away)}, expected > 0"
        )


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return (chosen - ref_chosen) - (rejected - ref_rejected)


@law(
    known_from="TRL #495, #1340, #1534, #3194 (the reference was another than was meant)",
    given=TWO,
)
def log_two_at_the_reference(f, chosen, rejected):
    """Log 2 where the policy is its reference."""
    args = [chosen, rejected, chosen.clone(), rejected.clone()]
    _is_mean_of(f, "the loss", args, torch.full_like(chosen, math.log(2)))


@law(
    known_from="TRL #4171 (always the same loss, whatever was asked for); open-unlearning #30",
    given=FOUR,
    needs=("beta",),
)
def is_dpo(f, **case):
    """It is -log sigmoid of beta times the margin."""
    args = list(case.values())
    _is_mean_of(f, "the loss", args, -logsigmoid(f.settings["beta"] * _margin(*args)))


@law(
    known_from="transformers_tasks #15 (the sigmoid without its logarithm)",
    given=TWO,
)
def log_two_at_a_tie(f, chosen, rejected):
    """Log 2 where both score the same."""
    _is_mean_of(f, "the loss", [chosen, chosen.clone()], torch.full_like(chosen, math.log(2)))


@law(
    known_from="transformers_tasks #15 (the sigmoid without its logarithm)",
    given=TWO,
)
def swapped_scores(f, chosen, rejected):
    """To swap chosen and rejected adds the difference of the scores."""
    swapped = Subject(lambda *_: f(rejected, chosen) - f(chosen, rejected), {})
    _is_mean_of(swapped, "the difference", [], chosen - rejected, atol=1e-4)


@law(
    known_from="DeepSpeedExamples #423, #501 (-log(sigmoid) is inf), OpenRLHF #1278",
    given=pairs("chosen", "rejected", among=_SCORES),
)
def far_apart(f, chosen, rejected):
    """Scores far apart stay finite, forward and backward, and still learn."""
    loss, slope = f.slope(chosen, rejected)
    finite("the loss", loss)
    finite("the gradient", slope)
    wrong = chosen - rejected < -20
    if (slope[wrong] == 0).any():
        raise Broken(f"the gradient is {show(slope)}, 0 where the worse answer is far ahead")


@law(
    known_from="TRL #1491, #2274, #2564, axolotl #3910 (ORPO's log(1 - exp(x)))",
    given=pairs("chosen", "rejected", among=_SURE),
)
def nearly_certain(f, chosen, rejected):
    """Answers that are nearly certain stay finite, forward and backward."""
    loss, slope = f.slope(chosen, rejected)
    finite("the loss", loss)
    finite("the gradient", slope)
