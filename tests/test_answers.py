"""Laws of reference_free.py, unpaired.py and listwise.py, and a float64 loop for each formula."""

import itertools
import math

import pytest
import torch
from cases_ground import array
from cases_groups import ragged
from cases_losses import arrays, refused
from cases_preference import cost, sigmoid
from cases_returns import trajectories
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.kl import k2
from rlhf_fn.listwise import ordinal_loss, plackett_luce, plackett_luce_dpo, step_loss
from rlhf_fn.policy import policy_gradient
from rlhf_fn.preference import bradley_terry, centring_penalty, dpo
from rlhf_fn.reference_free import alphapo, cpo, log_odds, orpo, simpo, slic
from rlhf_fn.unpaired import bco, kto, kto_baseline

close = torch.testing.assert_close
betas = st.floats(0.05, 3)
vectors = arrays(2).map(lambda xs: [x[0] for x in xs])
likely = st.floats(-30, -1e-6)


@given(vectors, betas, st.floats(0, 2))
def test_losses_without_a_reference_are_their_loops(pair, beta, number):
    loss, likely = simpo(*pair, beta=beta, margin=number), cpo(*pair, beta=beta, alpha=number)
    for got, also, w, l in zip(*[x.tolist() for x in (loss, likely, *pair)]):  # noqa: E741
        assert got == pytest.approx(cost(beta * (w - l) - number))
        assert also == pytest.approx(cost(beta * (w - l)) - number * w, abs=1e-12)


@given(vectors, betas)
def test_simpo_is_dpo_of_means_without_a_reference(pair, beta):
    nought = torch.zeros_like(pair[0])
    close(simpo(*pair, beta=beta, margin=0.0), dpo(*pair, nought, nought, beta=beta))


@given(array(3, 4), st.floats(0, 3), st.floats(0, 2))
def test_slic_is_its_loop(logprobs, margin, coef):
    loss = slic(*logprobs, margin=margin, coef=coef)
    for got, w, l, target in zip(*[x.tolist() for x in (loss, *logprobs)]):  # noqa: E741
        assert got == pytest.approx(max(0.0, margin - w + l) - coef * target, abs=1e-12)


@given(array(2, 4, elements=st.floats(-5, 0)), betas, st.sampled_from([-0.5, 0.25, 1.0]))
def test_alphapo_is_its_loop_and_runs_into_simpo(pair, beta, alpha):
    loss = alphapo(*pair, beta=beta, margin=0.5, alpha=alpha)
    for got, w, l in zip(*[x.tolist() for x in (loss, *pair)]):  # noqa: E741
        rewards = [(1 - math.exp(x) ** -alpha) / alpha for x in (w, l)]
        assert got == pytest.approx(cost(beta * (rewards[0] - rewards[1]) - 0.5))
    limit = alphapo(*pair, beta=beta, margin=0.5, alpha=1e-9)
    close(limit, simpo(*pair, beta=beta, margin=0.5), rtol=1e-6, atol=1e-6)


@given(array(2, 4, elements=likely), betas)
def test_orpo_is_its_loop(pair, coef):
    loss = orpo(*pair, coef=coef)
    for got, w, l in zip(*[x.tolist() for x in (loss, *pair)]):  # noqa: E741
        odds = [math.exp(x) / -math.expm1(x) for x in (w, l)]
        expected = -w + coef * math.log1p(odds[1] / odds[0])
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_and_its_gradient_are_finite_at_any_confidence(dtype):
    sure = torch.tensor([0.0, -1e-30, -1e-9, -1e-3, -1.0, -30.0, -700.0], dtype=dtype)
    for w, l in itertools.product(sure, sure):  # noqa: E741
        loss, slopes = orpo(w, l, coef=0.1), grad(orpo, (0, 1))(w, l, coef=0.1)
        assert loss.isfinite() and all(slope.isfinite() for slope in slopes)
        assert slopes[0] <= 0 <= slopes[1]


@given(array(5, elements=likely))
def test_log_odds_are_the_inverse_of_log_sigmoid(logprobs):
    back = torch.nn.functional.logsigmoid(log_odds(logprobs))
    close(back, logprobs, rtol=1e-6, atol=1e-12)


@given(array(2, 5), array(5, elements=st.booleans(), dtype=torch.bool), betas, st.floats(0, 2))
def test_kto_and_bco_are_their_loops(logprobs, desirable, beta, number):
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    gain = kto(*logprobs, desirable, beta=beta, baseline=number, **weights)
    binary = bco(*logprobs, desirable, beta=beta, shift=number)
    rows = zip(*[x.tolist() for x in (gain, binary, *logprobs, desirable)])
    for a, b, new, ref, good in rows:
        x, sign = new - ref, 1 if good else -1
        assert a == pytest.approx(
            (1.3 if good else 0.7) * (1 - sigmoid(sign * beta * (x - number)))
        )
        assert b == pytest.approx(cost(sign * (beta * x - number)))


@given(array(5), st.floats(0.1, 2), betas)
def test_kto_at_its_reference_point_is_half_its_weight_and_pushes_both_ways_alike(ref, z, beta):
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}

    def loss(logprobs, good):
        desirable = torch.full(ref.shape, good)
        return kto(logprobs, ref, desirable, beta=beta, baseline=z, **weights)

    close(loss(ref + z, True), torch.full_like(ref, 0.5))
    up, down = (grad(lambda x, g=good: loss(x, g).sum())(ref + z) for good in (True, False))
    close(up, torch.full_like(ref, -beta / 4))
    close(up, -down)


@given(ragged())
def test_kto_baseline_is_the_mean_of_the_kept_and_never_below_nought(case):
    x, mask = case
    kept = x[mask].tolist()
    got = kto_baseline(x, torch.zeros_like(x), mask)
    assert got.item() == pytest.approx(max(0.0, math.fsum(kept) / max(1, len(kept))), abs=1e-12)
    assert not kto_baseline(x.requires_grad_(), torch.zeros_like(x), mask).requires_grad


def ranking_loop(scores):
    chance = 1.0
    for k in range(len(scores)):
        powers = [math.exp(s) for s in scores[k:]]
        chance *= powers[0] / sum(powers)
    return -math.log(chance)


@given(ragged())
def test_plackett_luce_is_its_loop_over_the_items_there_are(case):
    scores, mask = case
    for got, row, keep in zip(plackett_luce(scores, mask).tolist(), scores, mask):
        assert got == pytest.approx(ranking_loop(row[keep].tolist()), rel=1e-9, abs=1e-9)


@given(array(4))
def test_the_chances_of_all_rankings_sum_to_one(scores):
    orders = torch.tensor(list(itertools.permutations(range(4))))
    chances = (-plackett_luce(scores[orders], torch.ones_like(orders, dtype=torch.bool))).exp()
    close(chances.sum(), torch.ones_like(chances.sum()))


@given(array(2, 2, 2), betas)
def test_rankings_of_two_are_pairs(logprobs, beta):
    new, ref = logprobs
    both = torch.ones_like(new, dtype=torch.bool)
    close(plackett_luce(new, both), bradley_terry(*new.unbind(-1)))
    expected = dpo(*new.unbind(-1), *ref.unbind(-1), beta=beta)
    close(plackett_luce_dpo(new, ref, both, beta=beta), expected)


@given(array(5), array(5, elements=st.integers(0, 3), dtype=torch.int64))
def test_ordinal_loss_is_its_loop_and_its_chances_sum_to_one(scores, grades):
    cuts = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    edges = [-math.inf, *cuts.tolist(), math.inf]
    for got, s, g in zip(
        *[x.tolist() for x in (ordinal_loss(scores, grades, thresholds=cuts), scores, grades)]
    ):
        above = [sigmoid(edge - s) if math.isfinite(edge) else float(edge > 0) for edge in edges]
        assert got == pytest.approx(-math.log(above[g + 1] - above[g]), rel=1e-6)
    each = torch.arange(4).expand(5, 4)
    chances = (-ordinal_loss(scores[:, None].expand(5, 4), each, thresholds=cuts)).exp()
    close(chances.sum(-1), torch.ones_like(scores))


@pytest.mark.parametrize("size", [40.0, -40.0, 1e4, -1e4])
def test_ordinal_loss_and_its_gradients_are_finite_however_far_off_a_score_is(size):
    scores, grades = torch.full((3,), size), torch.arange(3)
    cuts = torch.tensor([-1.0, 1.0])
    loss = lambda s, c: ordinal_loss(s, grades, thresholds=c).sum()  # noqa: E731
    assert loss(scores, cuts).isfinite()
    assert all(slope.isfinite().all() for slope in grad(loss, (0, 1))(scores, cuts))


@given(trajectories(count=2))
def test_step_loss_is_its_loop_at_the_ends_of_steps(case):
    logits, labels, mask, _ = case
    correct = labels > 0
    got = step_loss(logits, correct, mask)
    rows = zip(*[x.flatten().tolist() for x in (got, logits, correct, mask)])
    for loss, z, good, here in rows:
        assert loss == pytest.approx(cost(z if good else -z) if here else 0.0)


@given(array(2, 3, 5), array(3, 1), betas)
def test_nash_md_is_reinforce_on_the_win_rate_with_a_k2_penalty(logprobs, wins, beta):
    """−(p − ½) log π + β sg[log π/π_ref] log π, p the chance to win against the mixture."""
    new, ref = logprobs

    def paper(x):
        return (-(wins - 0.5) * x + beta * (new - ref) * x).sum()

    def ours(x):
        return (policy_gradient(x, wins - 0.5) + beta * k2(x, ref)).sum()

    close(grad(ours)(new), grad(paper)(new))


@given(vectors, st.floats(0, 1))
def test_centring_penalty_pulls_the_level_and_not_the_margin(pair, coef):
    w, l = pair  # noqa: E741
    expected = [coef * (a + b) ** 2 for a, b in zip(w.tolist(), l.tolist())]
    assert centring_penalty(w, l, coef=coef).tolist() == pytest.approx(expected)
    slopes = grad(lambda *r: centring_penalty(*r, coef=coef).sum(), (0, 1))(w, l)
    close(*slopes)


def test_losses_of_answers_refuse_what_does_not_fit_by_name():
    x, y, yes = torch.zeros(3), torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)
    with refused("rejected"):
        simpo(x, y, beta=0.1, margin=0.0)
    with refused("rejected_logprobs"):
        orpo(x, y, coef=0.1)
    with refused("alpha must not be 0"):
        alphapo(x, x, beta=0.1, margin=0.0, alpha=0.0)
    with refused("target_logprobs"):
        slic(x, x, y, margin=1.0, coef=0.1)
    with refused("alpha must be"):
        cpo(x, x, beta=0.1, alpha=-1.0)
    with refused("coef must be"):
        orpo(x, x, coef=-0.1)
    with refused("desirable must be torch.bool", TypeError):
        bco(x, x, x, beta=0.1, shift=0.0)
    with refused("beta must be"):
        bco(x, x, yes, beta=0.0, shift=0.0)
    with refused("undesirable_weight must be"):
        kto(x, x, yes, beta=0.1, baseline=0.0, desirable_weight=1.0, undesirable_weight=-1.0)
    with refused("mask"):
        plackett_luce(x, yes[:2])
    with refused("grades.* is 2"):
        ordinal_loss(x, torch.tensor([0, 2, 1]), thresholds=torch.tensor([0.0]))
    with refused("thresholds must rise"):
        ordinal_loss(x, torch.tensor([0, 1, 1]), thresholds=torch.tensor([1.0, 0.0]))
    with refused("correct must be torch.bool", TypeError):
        step_loss(x, x, yes)
