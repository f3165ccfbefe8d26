"""Laws of selection.py and mismatch.py, against loops over the kept tokens of ragged rows."""

import math

import pytest
import torch
from cases_ground import seeds
from cases_losses import array, refused
from cases_returns import trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from rlhf_fn import random
from rlhf_fn.kl import binary_kl, binary_tv, k3, log1mexp
from rlhf_fn.logprobs import full_kl
from rlhf_fn.selection import clip_cov_mask, token_covariance, top_fraction, trust_region_mask

close = torch.testing.assert_close
whole = st.integers(-3, 3).map(float)  # so that ties are common
shares = st.integers(0, 20).map(lambda n: n / 20)


@given(trajectories(count=1), shares)
def test_top_fraction_keeps_the_tokens_that_fewer_than_that_share_surpass(case, fraction):
    x, mask, _ = case
    x = x.round()
    kept = x[mask].tolist()
    got = top_fraction(x, mask, fraction=fraction)
    expected = [sum(v > u for v in kept) / len(kept) < fraction for u in kept]
    assert got[mask].tolist() == expected
    assert not got[~mask].any()


@given(trajectories(count=1), shares)
def test_top_fraction_keeps_at_least_that_share_and_without_ties_hardly_more(case, fraction):
    x, mask, _ = case
    apart = torch.linspace(0, 1, x.numel()).reshape(x.shape).double()
    number = int(mask.sum())
    got = int(top_fraction(apart, mask, fraction=fraction).sum())
    assert got == sum(i / number < fraction for i in range(number))
    assert int(top_fraction(x, mask, fraction=fraction).sum()) >= got
    assert (top_fraction(x, mask, fraction=1.0) == mask).all()


@given(trajectories(count=2))
def test_token_covariance_is_its_loop_and_sums_to_the_covariance(case):
    logprobs, advantages, mask, _ = case
    pairs = list(zip(logprobs[mask].tolist(), advantages[mask].tolist()))
    number = max(1, len(pairs))
    mean = [math.fsum(column) / number for column in zip(*pairs)] or [0.0, 0.0]
    got = token_covariance(logprobs, advantages, mask)
    expected = [(a - mean[0]) * (b - mean[1]) for a, b in pairs]
    assert got[mask].tolist() == pytest.approx(expected, abs=1e-9)
    assert (got[~mask] == 0).all()
    if len(pairs) > 1:
        exact = torch.cov(torch.tensor(pairs, dtype=torch.float64).T, correction=0)[0, 1]
        close(got.sum() / number, exact, rtol=1e-9, atol=1e-9)


@given(trajectories(count=1), seeds, shares, st.floats(-3, 0), st.floats(0, 3))
def test_clip_cov_leaves_out_that_share_of_tokens_from_between_the_bounds(
    case, seed, fraction, low, high
):
    covariance, mask, _ = case
    settings = {"fraction": fraction, "low": low, "high": high}
    poisoned = torch.where(mask, covariance, torch.nan)
    got = clip_cov_mask(poisoned, mask, random.key(seed), **settings)
    out = mask & ~got
    candidates = mask & (covariance > low) & (covariance < high)
    number = int(mask.sum())
    share = sum(i / number < fraction for i in range(number))
    assert not (out & ~candidates).any() and not got[~mask].any()
    assert int(out.sum()) == min(share, int(candidates.sum()))


def test_clip_cov_leaves_out_every_candidate_equally_often():
    keys = random.split(random.key(0), 3000)
    covariance, mask = torch.zeros(1, 8), torch.tensor([[True] * 6 + [False] * 2])
    one = lambda key: clip_cov_mask(covariance, mask, key, fraction=0.3, low=-1.0, high=1.0)  # noqa: E731
    out = 1 - vmap(one)(keys).double().mean(0)[0, :6]
    close(out, torch.full_like(out, 1 / 3), rtol=0, atol=0.05)  # 2 of 6; 6 standard errors
    assert not torch.equal(one(keys[0]), one(keys[1]))
    assert torch.equal(one(keys[0]), one(keys[0].clone()))


@given(array(2, 5), array(2, 5), array(2, 5), array(2, 5), st.floats(0, 2), st.floats(0, 2))
def test_trust_region_mask_is_its_loop(new, old, advantages, divergence, low, high):
    got = trust_region_mask(new, old, advantages, divergence, low=low, high=high)
    rows = zip(*[x.flatten().tolist() for x in (got, new, old, advantages, divergence)])
    for keep, p, q, a, d in rows:
        out = (a > 0 and p > q and d > high) or (a < 0 and p < q and d > low)
        assert keep == (not out)


@given(array(6), array(6))
def test_binary_divergences_are_those_of_two_outcomes_and_bound_those_of_all(new, old):
    new, old = new.log_softmax(-1), old.log_softmax(-1)
    for p, q, tv, kl in zip(
        *[x.tolist() for x in (new, old, binary_tv(new, old), binary_kl(new, old))]
    ):
        pi, mu = math.exp(p), math.exp(q)
        assert tv == pytest.approx(abs(pi - mu), abs=1e-15)
        exact = mu * (q - p) + (1 - mu) * (math.log1p(-mu) - math.log1p(-pi))
        assert kl == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert (binary_tv(new, old) <= (new.exp() - old.exp()).abs().sum() / 2 + 1e-12).all()
    assert (binary_kl(new, old) <= full_kl(old, new) + 1e-12).all()
    assert (binary_kl(new, old) >= -1e-12).all() and (binary_kl(new, new.clone()) == 0).all()


def test_binary_kl_at_certainty():
    zero, half = torch.tensor([0.0]), torch.tensor([0.5]).log()
    assert binary_kl(zero, zero.clone()) == 0
    close(binary_kl(half, zero), torch.tensor([2.0]).log())
    assert binary_kl(zero, half) == torch.inf
    assert torch.func.grad(lambda x: binary_kl(x, zero).sum())(half).isfinite().all()


@given(st.floats(-700, -1e-300))
def test_log1mexp_keeps_its_digits(x):
    expected = math.log(-math.expm1(x)) if x > -0.6931471805599453 else math.log1p(-math.exp(x))
    got = log1mexp(torch.tensor([x], dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=0)
    slope = torch.func.grad(lambda x: log1mexp(x).sum())(torch.tensor([x], dtype=torch.float64))
    assert slope.isfinite().all() or x > -1e-290


def test_masks_of_tokens_refuse_what_does_not_fit_by_name():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with refused("mask must be torch.bool", TypeError):
        top_fraction(x, x, fraction=0.2)
    with refused("fraction must be"):
        top_fraction(x, mask, fraction=1.5)
    with refused("shapes differ: x"):
        top_fraction(x[0], mask, fraction=0.2)
    with refused("advantages are"):
        token_covariance(x, x[0], mask)
    with refused(r"the leading axes of key, \(3,\), .* covariance, \(2, 3\)"):
        clip_cov_mask(x, mask, random.split(random.key(0), 3), fraction=0.1, low=0.0, high=1.0)
    with refused("high must be"):
        trust_region_mask(x, x, x, x, low=0.1, high=-0.1)
    with refused("divergence"):
        trust_region_mask(x, x, x, x[0], low=0.1, high=0.1)


@given(array(6), array(6), unit)
def test_a_trust_region_of_any_divergence_never_stops_a_token_from_coming_back(new, old, limit):
    advantages = old - new  # up where it has become less likely, down where more
    got = trust_region_mask(new, old, advantages, k3(new, old), low=limit, high=limit)
    assert got.all()
