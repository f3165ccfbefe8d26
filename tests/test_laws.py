"""The laws as they are offered to others: our own functions obey them, and reports are readable."""

import subprocess
import sys
from functools import partial

import pytest
import torch

import rlhf_fn as fn
from rlhf_fn.laws import KINDS, check
from rlhf_fn.strategies import groups, logits, pairs, policies, trajectories

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def mean(weights):
    return lambda x, mask: fn.weighted_sum(x, weights(mask))


def policy(loss, weights=fn.token_mean, **settings):
    """A loss of tokens, of which those that count are given to it, as `policy_loss` does."""

    def reduced(logprobs, old_logprobs, advantages, mask):
        kept = [torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages)]
        return fn.weighted_sum(loss(*kept, **settings), weights(mask))

    return reduced


def answers(loss, **settings):
    return lambda logprobs, old, advantages, mask: fn.weighted_sum(
        loss(logprobs, old, advantages, mask, **settings), fn.sequence_mean(mask)
    )


def value(loss):
    def reduced(values, old_values, returns, mask):
        kept = [torch.where(mask, x, 0.0) for x in (values, old_values, returns)]
        return fn.weighted_sum(loss(*kept), fn.sequence_mean(mask))

    return reduced


def step_loss(weights):
    def loss(parts):
        whole = weights(torch.cat([mask for _, mask in parts])).split([len(x) for x, _ in parts])
        return sum(fn.weighted_sum(x, w) for (x, _), w in zip(parts, whole))

    return loss


def preference(loss, **settings):
    return partial(loss, beta=0.1, **settings), "preference", {}


def adaptive_weight(logprobs, old_logprobs, advantages, mask):
    return fn.vespo(logprobs, old_logprobs, advantages, mask, k_positive=2.0, lam_positive=3.0,
                    k_negative=3.0, lam_negative=2.0)  # fmt: skip


OURS = {
    "token_logprobs": (fn.token_logprobs, "logprobs", {"temperature": 0.7}),
    "entropy": (fn.entropy, "entropy", {"temperature": 0.7}),
    "k1": (fn.k1, "kl", {}),
    "k2": (fn.k2, "kl loss", {}),
    "k3": (fn.k3, "non-negative kl", {}),
    "straight_through of k3": (
        lambda p, q: fn.straight_through(fn.k3(p, q), fn.k2(p, q)),
        "kl",
        {},
    ),
    "the same as a loss": (
        lambda p, q: fn.straight_through(fn.k3(p, q), fn.k2(p, q)),
        "kl loss",
        {},
    ),
    "policy_gradient": (policy(lambda p, old, a: fn.policy_gradient(p, a)), "policy", {}),
    "clipped_surrogate": (policy(fn.clipped_surrogate, **CLIP), "policy", CLIP),
    "of answers": (policy(fn.clipped_surrogate, fn.sequence_mean, **CLIP), "policy", CLIP),
    "dual clip": (policy(fn.dual_clipped_surrogate, **CLIP, dual_clip=3.0), "policy", CLIP),
    "gspo": (answers(fn.gspo, **CLIP), "policy", CLIP),
    "gspo_token": (answers(fn.gspo_token, **CLIP), "policy", CLIP),
    "gmpo": (answers(fn.gmpo, **CLIP), "policy", {}),
    "topr": (policy(fn.topr), "policy", {}),
    "sapo": (
        policy(fn.sapo, temperature_positive=1.0, temperature_negative=1.05),
        "policy",
        {},
    ),  # fmt: skip
    "dro": (policy(fn.dro, beta=0.1), "policy", {}),
    "cispo": (policy(fn.cispo, **CLIP), "cispo", {}),
    "value_loss": (value(lambda v, old, r: fn.value_loss(v, r)), "value", {"clip": torch.inf}),
    "clipped_value_loss": (value(partial(fn.clipped_value_loss, clip=0.2)), "value", {"clip": 0.2}),
    "huber_value_loss": (value(lambda v, o, r: fn.huber_value_loss(v, r, delta=1.0)), "value", {}),
    "token_mean": (mean(fn.token_mean), "token mean", {}),
    "sequence_mean": (mean(fn.sequence_mean), "sequence mean", {}),
    "sequence_sum": (mean(fn.sequence_sum), "sequence sum", {}),
    "fixed_length": (mean(partial(fn.fixed_length, length=7)), "reduction", {}),
    "token_mean of parts": (step_loss(fn.token_mean), "accumulation", {}),
    "sequence_mean of parts": (step_loss(fn.sequence_mean), "accumulation", {}),
    "shape_rewards": (partial(fn.shape_rewards, beta=0.1), "rewards", {}),
    "gae": (fn.gae, "gae", {"discount": 0.9, "lam": 0.8}),
    "whiten": (partial(fn.whiten, eps=1e-8, shift_mean=True), "whiten", {}),
    "grpo_advantages": (fn.grpo_advantages, "group advantages", {"ddof": 1, "eps": 1e-6}),
    "dr_grpo_advantages": (fn.dr_grpo_advantages, "group advantages", {}),
    "rloo_advantages": (fn.rloo_advantages, "group advantages", {}),
    "pass_at_k_advantages": (fn.pass_at_k_advantages, "group advantages", {}),
    "dpo": (fn.dpo, "dpo", {"beta": 0.1}),
    "ipo": preference(fn.ipo),
    "hinge_dpo": preference(fn.hinge_dpo),
    "robust_dpo": preference(fn.robust_dpo, label_smoothing=0.1),
    "nca": preference(fn.nca),
    "sppo": preference(fn.sppo),
    "apo_zero": preference(fn.apo_zero),
    "exo": preference(fn.exo, label_smoothing=0.01),
    "bradley_terry": (fn.bradley_terry, "reward loss", {}),
    "orpo": (partial(fn.orpo, coef=0.1), "odds ratio", {}),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_functions_obey_every_law_of_their_kind(name):
    function, like, settings = OURS[name]
    report = check(function, like=like, examples=15, **settings)
    assert report.holds, str(report)


def test_every_kind_has_a_function_of_ours_that_is_asked_all_of_its_laws():
    asked = {like for _, like, settings in OURS.values() if KINDS[like].settings - {"temperature"}
             <= settings.keys()}  # fmt: skip
    assert asked == KINDS.keys()


def half_mean(x, mask):
    return 0.5 * (x * mask).sum() / mask.sum()


def test_a_report_has_the_smallest_input_as_nested_lists_and_the_bug_it_is_known_from():
    text = str(check(half_mean, like="token mean"))
    assert "half_mean as token mean: f(per_token [batch, time], mask) -> scalar" in text
    assert "the loss is 0.5, expected 1\n               x = [[1]]\n" in text
    assert "mask = [[True]]" in text and "known from: TRL #2881" in text
    assert "rllm #508" in text and text.endswith(" of 7 laws hold")


def test_the_same_question_gets_the_same_answer():
    first, second = (str(check(half_mean, like="token mean")) for _ in range(2))
    assert first == second


def test_a_function_that_raises_is_told_so_and_accused_of_nothing():
    def fragile(x, mask):
        if len(x) > 1:
            raise KeyError("rows")
        return fn.weighted_sum(x, fn.token_mean(mask))

    report = check(fragile, like="token mean")
    text = str(report)
    assert not report.holds and "RAISED" in text and "raised KeyError: 'rows'" in text
    assert "known from" not in text and "[[0], [0]]" in text


def test_a_plain_number_is_no_gradient_and_a_constant_tensor_is_a_finding():
    like = {"like": "value", "laws": ["A value too high has a gradient > 0, one too low < 0"]}
    (number,) = check(lambda v, old, r, m: 0.5, **like).verdicts
    (constant,) = check(lambda v, old, r, m: torch.tensor(0.5), **like).verdicts
    assert number.outcome == "not asked" and "plain number" in number.why
    assert constant.outcome == "broken" and "no gradient" in constant.why


def test_what_is_neither_tensor_nor_number_is_a_finding():
    report = check(lambda logits: "high", like="entropy")
    assert all("expected a tensor" in v.why for v in report.verdicts)


def test_a_function_that_answers_otherwise_every_time_is_said_not_to_be_deterministic():
    calls = iter(range(10**9))
    report = check(lambda x, mask: half_mean(x, mask) + (next(calls) == 40), like="reduction")
    assert "not deterministic" in str(report)


def test_a_law_whose_setting_is_not_given_is_not_asked():
    report = check(policy(fn.clipped_surrogate, **CLIP), like="policy")
    assert report.verdicts[-1].outcome == "not asked"
    assert "clip_low=, clip_high=" in str(report)


def test_settings_go_to_a_function_that_has_a_parameter_for_them_and_to_no_other():
    def loss(chosen, rejected, ref_chosen, ref_rejected, beta):
        return fn.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta)

    assert check(loss, like="dpo", beta=0.3).holds
    assert check(partial(fn.dpo, beta=0.3), like="dpo", beta=0.3).holds
    assert check(lambda c, r, *ref: fn.dpo(c, r, *ref, beta=0.3), like="dpo", beta=0.3).holds


def test_laws_are_chosen_and_skipped_by_name():
    names = [law.name for law in KINDS["dpo"].laws]
    only = check(fn.dpo, like="dpo", laws=names[:2], skip=names[:1], beta=0.1)
    assert [v.law.name for v in only.verdicts] == names[1:2]
    with pytest.raises(ValueError, match="'all' is no law of 'dpo'; they are: It writes"):
        check(fn.dpo, like="dpo", skip=["all"], beta=0.1)


@pytest.mark.parametrize(
    ("error", "message", "question"),
    [
        (ValueError, "like='pg' is no kind; the kinds are: logprobs", {"like": "pg"}),
        (ValueError, "lam is missing", {"like": "gae", "discount": 0.9}),
        (TypeError, r"called as f\(per_token.*too many", {"like": "token mean"}),
        (TypeError, "gamma= is neither.*discount, lam", {"like": "gae", "gamma": 0.9}),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_name(error, message, question):
    with pytest.raises(error, match=message):
        check(lambda logits: logits, **question)


@pytest.mark.parametrize(
    "strategy", [logits(), trajectories("x"), policies(), groups(), pairs("x")]
)
def test_what_strategies_draw_is_small_and_shrinks_to_zeros(strategy):
    from hypothesis import find

    case = find(strategy, lambda case: True)
    for x in case.values():
        assert x.numel() <= 5 and (x.dtype == torch.bool or (x.abs() <= 0.125).all())


def test_importing_the_package_does_not_import_hypothesis():
    code = "import sys, rlhf_fn, rlhf_fn.cli; print('hypothesis' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
