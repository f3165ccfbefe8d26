"""Laws of distillation.py, references.py and the value losses that are not squared errors."""

import math

import pytest
import torch
from cases_ground import array
from cases_losses import arrays, refused
from cases_returns import VOCAB, trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.distillation import dft, generalised_jsd, smoothed_cross_entropy
from rlhf_fn.logprobs import cross_entropy, full_kl, token_logprobs
from rlhf_fn.references import periodic_update, soft_update
from rlhf_fn.value import huber_value_loss, quantile_value_loss, value_loss
from rlhf_fn.weights import segment_mean

close = torch.testing.assert_close
logits = array(3, VOCAB)
tokens = array(3, elements=st.integers(0, VOCAB - 1), dtype=torch.int64)
inside = st.floats(0.01, 0.99)


@given(logits, tokens, st.floats(0, 0.9))
def test_smoothed_cross_entropy_is_its_loop(logits, tokens, share):
    got = smoothed_cross_entropy(logits, tokens, label_smoothing=share)
    for out, row, token in zip(got.tolist(), logits.softmax(-1).tolist(), tokens.tolist()):
        target = [share / VOCAB + (1 - share) * (v == token) for v in range(VOCAB)]
        assert out == pytest.approx(-math.fsum(t * math.log(p) for t, p in zip(target, row)))


@given(logits, tokens)
def test_cross_entropy_is_that_without_smoothing_even_where_a_token_is_banned(logits, tokens):
    banned = logits.masked_fill(torch.arange(VOCAB) == (tokens[:, None] + 1) % VOCAB, -torch.inf)
    for z in (logits, banned):
        plain = smoothed_cross_entropy(z, tokens, label_smoothing=0.0)
        close(plain, cross_entropy(z, tokens))
        slope = grad(lambda z: smoothed_cross_entropy(z, tokens, label_smoothing=0.0).sum())(z)
        close(slope, grad(lambda z: cross_entropy(z, tokens).sum())(z))


@given(st.floats(0.01, 0.9))
def test_smoothed_cross_entropy_is_least_at_the_smoothed_target(share):
    target = torch.full((1, VOCAB), share / VOCAB, dtype=torch.float64)
    target[0, 1] += 1 - share
    loss = lambda z: smoothed_cross_entropy(z, torch.tensor([1]), label_smoothing=share).sum()  # noqa: E731
    close(grad(loss)(target.log()), torch.zeros_like(target), rtol=0, atol=1e-12)


@given(logits, tokens)
def test_dft_descends_the_probability_itself(logits, tokens):
    loss = lambda z: dft(token_logprobs(z, tokens)).sum()  # noqa: E731
    likelihood = lambda z: -token_logprobs(z, tokens).exp().sum()  # noqa: E731
    close(grad(loss)(logits), grad(likelihood)(logits))
    for got, x in zip(dft(-logits.abs())[0].tolist(), -logits.abs()[0]):
        assert got == pytest.approx(-math.exp(x) * x.item(), abs=1e-15)


def divergence_loop(p, q, beta):
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q)]
    kl = lambda x: math.fsum(a * math.log(a / m) for a, m in zip(x, mixed) if a > 0)  # noqa: E731
    return beta * kl(p) + (1 - beta) * kl(q)


@given(logits, logits, inside)
def test_generalised_jsd_is_its_loop_symmetric_and_bounded(student, teacher, beta):
    got = generalised_jsd(student, teacher, beta=beta)
    for out, q, p in zip(got.tolist(), student.softmax(-1).tolist(), teacher.softmax(-1).tolist()):
        assert out == pytest.approx(divergence_loop(p, q, beta), rel=1e-6, abs=1e-12)
    close(got, generalised_jsd(teacher, student, beta=1 - beta))
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (got >= -1e-12).all() and (got <= bound + 1e-12).all()
    close(generalised_jsd(student, student, beta=beta), torch.zeros_like(got))


@given(logits, logits)
def test_generalised_jsd_runs_into_the_forward_and_the_reverse_kl(student, teacher):
    few = 1e-7
    forward = generalised_jsd(student, teacher, beta=few) / few
    close(forward, full_kl(teacher, student), rtol=1e-3, atol=1e-4)
    reverse = generalised_jsd(student, teacher, beta=1 - few) / few
    close(reverse, full_kl(student, teacher), rtol=1e-3, atol=1e-4)


def test_generalised_jsd_of_banned_tokens_is_finite_forward_and_backward():
    student = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    teacher = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    p, q = (x.softmax(-1)[0].tolist() for x in (teacher, student))
    got = generalised_jsd(student, teacher, beta=0.3)
    assert got.item() == pytest.approx(divergence_loop(p, q, 0.3), rel=1e-5)
    for argnum in (0, 1):
        slope = grad(lambda *z: generalised_jsd(*z, beta=0.3).sum(), argnum)(student, teacher)
        assert slope.isfinite().all()


@given(arrays(2), st.floats(0.01, 5))
def test_huber_value_loss_is_its_loop(pair, delta):
    loss = huber_value_loss(*pair, delta=delta)
    for got, v, r in zip(*[x.flatten().tolist() for x in (loss, *pair)]):
        e = abs(v - r)
        expected = e * e / 2 if e <= delta else delta * (e - delta / 2)
        assert got == pytest.approx(expected, abs=1e-12)


@given(arrays(2), st.floats(0.01, 5))
def test_huber_value_loss_has_the_error_up_to_delta_for_a_gradient(pair, delta):
    values, returns = pair
    slope = grad(lambda v: huber_value_loss(v, returns, delta=delta).sum())(values)
    close(slope, (values - returns).clamp(-delta, delta))
    close(huber_value_loss(*pair, delta=math.inf), value_loss(*pair))
    free = grad(lambda v: huber_value_loss(v, returns, delta=math.inf).sum())(values)
    close(free, values - returns)


@given(array(2, 3, 4), array(2, 3))
def test_quantile_value_loss_is_its_loop(quantiles, returns):
    got = quantile_value_loss(quantiles, returns)
    for i in range(2):
        for t in range(3):
            u = [returns[i, t].item() - q for q in quantiles[i, t].tolist()]
            terms = [x * ((2 * k + 1) / 8 - (x < 0)) for k, x in enumerate(u)]
            assert got[i, t].item() == pytest.approx(math.fsum(terms), abs=1e-9)
    median = quantile_value_loss(quantiles[..., :1], returns)
    close(median, (returns - quantiles[..., 0]).abs() / 2)


@given(st.lists(st.integers(-20, 20), min_size=8, max_size=8, unique=True))
def test_quantile_value_loss_is_least_at_the_quantiles_of_the_returns(returns):
    """Eight returns and two quantiles, at τ = ¼ and ¾: no more than that share lies below each."""
    samples = torch.tensor(sorted(returns), dtype=torch.float64)[:, None]
    best = torch.stack([samples[1, 0] + samples[2, 0], samples[5, 0] + samples[6, 0]]) / 2

    def loss(quantiles):
        return quantile_value_loss(quantiles.expand(8, 1, 2), samples).sum()

    close(grad(loss)(best), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert loss(best + 3) >= loss(best) and loss(best - 3) >= loss(best)


@given(array(5), array(5), unit)
def test_references_move_by_their_rate_or_at_their_steps(old, new, rate):
    trees = ({"a": old, "b": old[:2]}, {"a": new, "b": new[:2]})
    moved = soft_update(*trees, rate=rate)
    close(moved["a"], (1 - rate) * old + rate * new)
    assert soft_update(*trees, rate=0.0)["b"].tolist() == old[:2].tolist()
    for step in (0, 1, 5, 6):
        got = periodic_update(*trees, step=step, every=3)
        expected = trees[1] if step % 3 == 0 else trees[0]
        close(got, expected, rtol=0, atol=0)
        close(periodic_update(*trees, step=torch.tensor(step), every=3), expected, rtol=0, atol=0)


@given(trajectories(count=0), st.data())
def test_segment_mean_weighs_every_example_of_packed_rows_the_same(case, data):
    mask, _ = case
    steps = data.draw(array(*mask.shape, elements=st.integers(0, 1), dtype=torch.int64))
    segments = steps.cumsum(-1)
    runs = {}
    for i, t in mask.nonzero().tolist():
        runs.setdefault((i, segments[i, t].item()), []).append((i, t))
    expected = torch.zeros(mask.shape)
    for run in runs.values():
        for i, t in run:
            expected[i, t] = 1 / len(run) / len(runs)
    close(segment_mean(mask, segments), expected)


def test_settings_of_distillation_and_critics_that_cannot_mean_anything_are_refused():
    x, z = torch.zeros(2, 3), torch.zeros(2, 3, 4)
    with refused("label_smoothing must be"):
        smoothed_cross_entropy(z, torch.zeros(2, 3, dtype=torch.long), label_smoothing=1.0)
    for beta in (0.0, 1.0):
        with refused("beta must be"):
            generalised_jsd(z, z, beta=beta)
    with refused("teacher_logits"):
        generalised_jsd(z, z[:1], beta=0.5)
    with refused("delta must be"):
        huber_value_loss(x, x, delta=-1.0)
    with refused("returns"):
        quantile_value_loss(z, x[0])
    with refused("rate must be"):
        soft_update(x, x, rate=2.0)
    with refused("every must be at least 1"):
        periodic_update(x, x, step=3, every=0)
    with refused("segments must hold integers", TypeError):
        segment_mean(x == 0, x)
