"""Laws of direct.py and pairs.py, and a float64 loop beside each formula."""

import math

import pytest
import torch
from cases_ground import masks
from cases_losses import array, refused
from cases_preference import cost, sigmoid
from cases_returns import VOCAB, trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.direct import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo,
    hinge_dpo,
    ipo,
    nca,
    robust_dpo,
    sppo,
)
from rlhf_fn.pairs import (
    alpha_divergence_reward,
    aot,
    aot_unpaired,
    desensitised_logprob,
    dynamic_beta,
    jensen_shannon_reward,
    rpo,
    wpo_weight,
    xpo,
)
from rlhf_fn.preference import bradley_terry, dpo
from rlhf_fn.sequence import masked_sum
from rlhf_fn.unpaired import bco, kto

close = torch.testing.assert_close
betas = st.floats(0.05, 2)
shares = st.floats(0.01, 0.45)


def exo_loop(a, b, beta, label_smoothing):
    p = sigmoid(beta * (a - b))
    return p * math.log(p / (1 - label_smoothing)) + (1 - p) * math.log((1 - p) / label_smoothing)


def robust_loop(a, b, beta, label_smoothing):
    m, e = beta * (a - b), label_smoothing
    return ((1 - e) * cost(m) - e * cost(-m)) / (1 - 2 * e)


def discopop_loop(a, b, beta, temperature):
    m = beta * (a - b)
    return (1 - sigmoid(m / temperature)) * cost(m) + sigmoid(m / temperature) * math.exp(-m)


BETA, SMOOTH = {"beta": betas}, {"beta": betas, "label_smoothing": shares}
LOOPS = {  # the loss, a strategy for each setting, the loss of one pair from its log-ratios
    hinge_dpo: (BETA, lambda a, b, beta: max(0.0, 1 - beta * (a - b))),
    ipo: (BETA, lambda a, b, beta: (a - b - 1 / (2 * beta)) ** 2),
    robust_dpo: (SMOOTH, robust_loop),
    exo: (SMOOTH, exo_loop),
    nca: (BETA, lambda a, b, beta: cost(beta * a) + cost(-beta * a) / 2 + cost(-beta * b) / 2),
    sppo: (BETA, lambda a, b, beta: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2),
    apo_zero: (BETA, lambda a, b, beta: 1 - sigmoid(beta * a) + sigmoid(beta * b)),
    apo_down: (BETA, lambda a, b, beta: sigmoid(beta * a) + 1 - sigmoid(beta * (a - b))),
    discopop: (BETA | {"temperature": st.floats(0.05, 1)}, discopop_loop),
    bco_pair: (
        BETA | {"shift": st.floats(-1, 1)},
        lambda a, b, beta, shift: cost(beta * a - shift) + cost(shift - beta * b),
    ),
}
losses = pytest.mark.parametrize("loss", LOOPS, ids=lambda f: f.__name__)
pairs = st.integers(1, 5).flatmap(lambda n: st.tuples(*[array(n)] * 4))


@losses
@given(pairs, st.data())
def test_a_loss_of_pairs_is_its_loop(loss, logprobs, data):
    strategies, formula = LOOPS[loss]
    settings = data.draw(st.fixed_dictionaries(strategies))
    out = loss(*logprobs, **settings)
    for got, w, l, ref_w, ref_l in zip(*[x.tolist() for x in (out, *logprobs)]):  # noqa: E741
        expected = formula(w - ref_w, l - ref_l, **settings)
        assert got == pytest.approx(expected, rel=1e-7, abs=1e-9)


@losses
@given(pairs, st.data(), st.integers(-8, 8))
def test_a_loss_of_pairs_knows_log_probs_only_against_their_reference(loss, logprobs, data, shift):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    settings = data.draw(st.fixed_dictionaries(LOOPS[loss][0]))
    shifted = loss(w + shift, l - shift, ref_w + shift, ref_l - shift, **settings)
    close(shifted, loss(*logprobs, **settings), rtol=1e-6, atol=1e-6)


@losses
@pytest.mark.parametrize("size", [1e3, -1e3])
def test_a_loss_of_pairs_and_its_gradient_are_finite_however_sure_the_policy_is(loss, size):
    settings = {"beta": 0.5} | ({"label_smoothing": 0.1} if loss in (robust_dpo, exo) else {})
    settings |= {"temperature": 0.05} if loss is discopop else {}
    far, nought = torch.tensor([size / 10 if loss is discopop else size]), torch.zeros(1)
    for pair in ((far, nought), (nought, far), (far, -far)):
        out = loss(*pair, nought, nought, **settings)
        slopes = grad(lambda w, l: loss(w, l, nought, nought, **settings).sum(), (0, 1))(*pair)  # noqa: B023, E741
        assert out.isfinite().all() and all(slope.isfinite().all() for slope in slopes)


@given(pairs, betas)
def test_robust_dpo_of_clean_labels_is_dpo_and_of_flipped_ones_dpo_in_the_mean(logprobs, beta):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    clean = dpo(*logprobs, beta=beta)
    close(robust_dpo(*logprobs, beta=beta, label_smoothing=0.0), clean)
    for share in (0.1, 0.4):
        right = robust_dpo(*logprobs, beta=beta, label_smoothing=share)
        wrong = robust_dpo(l, w, ref_l, ref_w, beta=beta, label_smoothing=share)
        close((1 - share) * right + share * wrong, clean)


@given(betas, shares)
def test_exo_is_nought_at_the_margin_that_says_how_sure_the_labels_are(beta, share):
    best = torch.tensor([math.log((1 - share) / share) / beta], dtype=torch.float64)
    nought = torch.zeros_like(best)

    def loss(w):
        return exo(w, nought, nought, nought, beta=beta, label_smoothing=share).sum()

    assert abs(loss(best)) < 1e-9 and abs(grad(loss)(best)) < 1e-9
    assert loss(best + 0.1) > 0 and loss(best - 0.1) > 0


@given(pairs, betas)
def test_ipo_and_sppo_are_least_at_their_targets(logprobs, beta):
    _, _, ref_w, ref_l = logprobs
    target = 1 / (2 * beta)
    close(ipo(ref_w + target, ref_l, ref_w, ref_l, beta=beta), 0 * ref_w)
    close(sppo(ref_w + target, ref_l - target, ref_w, ref_l, beta=beta), 0 * ref_w)
    slope = grad(lambda w: ipo(w, ref_l, ref_w, ref_l, beta=beta).sum())(ref_w)
    close(slope, torch.full_like(slope, -2 * target))


@given(pairs, betas)
def test_halves_of_pairs_are_losses_of_single_answers(logprobs, beta):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    yes, no = torch.ones_like(w, dtype=torch.bool), torch.zeros_like(w, dtype=torch.bool)
    both = bco(w, ref_w, yes, beta=beta, shift=0.3) + bco(l, ref_l, no, beta=beta, shift=0.3)
    close(bco_pair(*logprobs, beta=beta, shift=0.3), both)
    plain = {"beta": beta, "baseline": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    close(apo_zero(*logprobs, beta=beta), kto(w, ref_w, yes, **plain) + kto(l, ref_l, no, **plain))


def quantile_loop(left, right, beta, share):
    """AOT's loss of two samples: their order statistics are compared one by one."""
    gaps = [beta * (a - b) for a, b in zip(sorted(left), sorted(right))]
    return [(1 - share) * cost(m) + share * cost(-m) for m in gaps]


@given(pairs, betas, shares)
def test_aot_is_its_loop_over_order_statistics(logprobs, beta, share):
    w, l, ref_w, ref_l = [x.tolist() for x in logprobs]  # noqa: E741
    settings = {"beta": beta, "label_smoothing": share}
    less = lambda xs, ys: [x - y for x, y in zip(xs, ys)]  # noqa: E731
    paired = quantile_loop(less(w, l), less(ref_w, ref_l), beta, share)
    assert aot(*logprobs, **settings).tolist() == pytest.approx(paired)
    unpaired = quantile_loop(less(w, ref_w), less(l, ref_l), beta, share)
    assert aot_unpaired(*logprobs, **settings).tolist() == pytest.approx(unpaired)


@given(pairs, betas)
def test_aot_of_one_pair_is_dpo(logprobs, beta):
    one = [x[:1] for x in logprobs]
    close(aot(*one, beta=beta), dpo(*one, beta=beta))
    close(aot_unpaired(*one, beta=beta), dpo(*one, beta=beta))


@given(array(5), array(5), betas, st.floats(0.01, 1))
def test_rewards_of_other_divergences_are_the_derivatives_of_their_f(logprobs, ref, beta, alpha):
    """r = β f'(u), up to a constant, for f(u) = Σ p f(q/p) the divergence's generator."""
    u = (logprobs - ref).exp()
    got = alpha_divergence_reward(logprobs, ref, beta=beta, alpha=alpha)
    close(got, beta * (1 - u**-alpha) / alpha, rtol=1e-6, atol=1e-6)

    def shannon(u):
        return (u * u.log() - (1 + u) * ((1 + u) / 2).log()).sum()

    close(jensen_shannon_reward(logprobs, ref, beta=beta), beta * grad(shannon)(u))
    forward = alpha_divergence_reward(logprobs, ref, beta=beta, alpha=1.0)
    close(forward - beta, beta * grad(lambda u: -u.log().sum())(u), rtol=1e-6, atol=1e-6)


@given(pairs, betas)
def test_f_dpo_runs_into_dpo_as_its_divergence_becomes_the_reverse_kl(logprobs, beta):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    good = alpha_divergence_reward(w, ref_w, beta=beta, alpha=1e-7)
    bad = alpha_divergence_reward(l, ref_l, beta=beta, alpha=1e-7)
    close(bradley_terry(good, bad), dpo(*logprobs, beta=beta), rtol=1e-4, atol=1e-4)


@given(trajectories(count=1), unit, st.integers(0, 9))
def test_desensitised_logprob_is_its_loop(case, alpha, length):
    logprobs, mask, _ = case
    shared = torch.full((len(mask),), length)
    got = desensitised_logprob(logprobs, shared, mask, alpha=alpha)
    for out, row, keep in zip(got.tolist(), logprobs, mask):
        kept = row[keep].tolist()
        assert out == pytest.approx(math.fsum(kept[:length]) + alpha * math.fsum(kept[length:]))
    close(desensitised_logprob(logprobs, shared, mask, alpha=1.0), masked_sum(logprobs, mask))


@given(
    array(2, 4, VOCAB),
    array(2, 4, elements=st.integers(0, VOCAB - 1), dtype=torch.int64),
    masks(2, 4),
)
def test_wpo_weight_is_its_loop_and_one_where_every_token_is_as_likely(logits, tokens, mask):
    got = wpo_weight(logits, tokens, mask)
    probs = logits.softmax(-1)
    for i in range(2):
        kept = [
            math.log(probs[i, t, tokens[i, t]]) - math.log((probs[i, t] ** 2).sum())
            for t in range(4)
            if mask[i, t]
        ]
        assert got[i].item() == pytest.approx(math.exp(math.fsum(kept) / max(1, len(kept))))
    close(wpo_weight(0 * logits, tokens, mask), torch.ones_like(got))


@given(pairs, betas, st.floats(0, 2))
def test_mixtures_are_dpo_and_a_likelihood(logprobs, beta, alpha):
    w = logprobs[0]
    lengths = torch.arange(1, len(w) + 1)
    plain = dpo(*logprobs, beta=beta)
    expected = [d - alpha * x / n for d, x, n in zip(*[x.tolist() for x in (plain, w, lengths)])]
    assert rpo(*logprobs, lengths, beta=beta, alpha=alpha).tolist() == pytest.approx(expected)
    slope = grad(lambda x: xpo(*logprobs, x, beta=beta, alpha=alpha).sum())(w)
    close(slope, torch.full_like(w, alpha))
    close(xpo(*logprobs, w, beta=beta, alpha=0.0), plain, rtol=0, atol=0)


@given(array(4), betas, st.floats(0, 1), st.floats(-1, 1))
def test_dynamic_beta_grows_with_the_margin_and_is_beta_at_the_baseline(margin, beta, alpha, mean):
    got = dynamic_beta(margin, beta=beta, alpha=alpha, baseline=mean)
    expected = [beta + alpha * (m - mean) * beta for m in margin.tolist()]
    assert got.tolist() == pytest.approx(expected)


@losses
def test_losses_of_pairs_refuse_what_does_not_fit_by_name(loss):
    x, y = torch.zeros(3), torch.zeros(3, 1)
    settings = {"label_smoothing": 0.1} if loss in (robust_dpo, exo) else {}
    settings |= {"temperature": 0.05} if loss is discopop else {}
    for i in range(4):
        with refused("shapes differ"):
            loss(*[y if i == j else x for j in range(4)], beta=0.1, **settings)
    with refused("beta must be"):
        loss(x, x, x, x, beta=-0.1, **settings)
    for name in settings:
        with refused(f"{name} must be"):
            loss(x, x, x, x, beta=0.1, **{name: -0.5})


def test_what_stands_around_a_loss_of_pairs_refuses_what_does_not_fit_by_name():
    x, mask = torch.zeros(3), torch.ones(2, 3, dtype=torch.bool)
    with refused("label_smoothing must be"):
        exo(x, x, x, x, beta=0.1, label_smoothing=0.0)
    with refused("alpha must be"):
        alpha_divergence_reward(x, x, beta=0.1, alpha=0.0)
    for rows in (1, 3):  # one would broadcast
        with refused("one length per row"):
            lengths = torch.ones(rows, dtype=torch.long)
            desensitised_logprob(torch.zeros(2, 3), lengths, mask, alpha=0.5)
    with refused("chosen_lengths must be at least 1"):
        rpo(x, x, x, x, torch.zeros(3, dtype=torch.long), beta=0.1, alpha=1.0)
    with refused("explored_logprobs"):
        xpo(x, x, x, x, x[:2], beta=0.1, alpha=1.0)
