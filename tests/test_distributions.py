"""Laws of distributions.py, beside torch's own."""

import math

import pytest
import torch
from cases_ground import array, finite, keys, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence
from torch.func import grad, vmap

from rlhf_fn import distributions, random

close = torch.testing.assert_close
logits = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda s: st.tuples(*[array(*s, elements=st.floats(-30, 30, width=32))] * 2)
)


@given(logits)
def test_categorical_is_the_one_of_torch(pair):
    x, y = pair
    actions = torch.arange(len(x)) % x.shape[-1]
    p, q = Categorical(logits=x), Categorical(logits=y)
    close(distributions.categorical_log_prob(x, actions), p.log_prob(actions))
    close(distributions.categorical_entropy(x), p.entropy())
    close(distributions.categorical_kl(x, y), kl_divergence(p, q))


@given(logits, finite)
def test_categorical_does_not_depend_on_a_shift_of_the_logits(pair, shift):
    x, y = pair
    close(distributions.categorical_entropy(x + shift), distributions.categorical_entropy(x))
    close(distributions.categorical_kl(x + shift, y - shift), distributions.categorical_kl(x, y))
    assert (distributions.categorical_kl(x, y) > -1e-12).all()
    close(distributions.categorical_kl(x, x), torch.zeros(len(x), dtype=x.dtype), rtol=0, atol=0)


@given(logits, seeds)
def test_a_ruled_out_action_is_as_if_it_were_not_there(pair, seed):
    x, y = pair
    hole = torch.full_like(x[:, :1], -math.inf)
    x_hole, y_hole = torch.cat([hole, x, hole], -1), torch.cat([hole, y, hole], -1)
    for f, holed, plain in (
        (distributions.categorical_entropy, (x_hole,), (x,)),
        (distributions.categorical_kl, (x_hole, y_hole), (x, y)),
    ):
        close(f(*holed), f(*plain))
        close(grad(lambda *a, f=f: f(*a).sum())(*holed)[:, 1:-1], grad(
            lambda *a, f=f: f(*a).sum()
        )(*plain))  # fmt: skip
        assert grad(lambda *a, f=f: f(*a).sum())(*holed).isfinite().all()
    draws = distributions.categorical_sample(x_hole, random.key(seed))
    assert torch.equal(draws, 1 + distributions.categorical_sample(x, random.key(seed)))


def test_kl_is_infinite_where_the_reference_rules_out_what_the_policy_allows():
    x, y = torch.zeros(2), torch.tensor([0.0, -math.inf])
    assert distributions.categorical_kl(x, y) == math.inf
    assert distributions.categorical_kl(y, x) == pytest.approx(math.log(2))


def test_categorical_samples_have_their_probabilities():
    x = torch.tensor([0.0, -math.inf, 1.0, -2.0, 3.0])
    n = 100_000
    draws = distributions.categorical_sample(x.expand(n, 5), random.key(1))
    counts, p = torch.bincount(draws, minlength=5).double(), x.softmax(0).double()
    assert counts[1] == 0
    assert ((counts - n * p) ** 2 / (n * p).clamp(min=1)).sum() < 21  # chi-square, 3 degrees, 1e-4


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_extreme_draws_are_actions_that_are_possible(monkeypatch, word):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(tuple(shape), word))
    for x in (torch.tensor([-math.inf, 0.0, -80.0, -math.inf]), torch.tensor([0.0])):
        action = distributions.categorical_sample(x[None], random.key(0))
        assert 0 <= action < len(x) and x[action] == 0.0


@given(st.integers(257, 1100), seeds, st.floats(0, 30))
def test_a_draw_is_the_first_action_past_its_share_of_the_whole(size, seed, spread):
    impossible, values, key = random.split(random.key(seed), 3)
    x = spread * random.normal(values, (size,)).double()
    x = torch.where(random.uniform(impossible, (size,)) < 0.3, -math.inf, x)
    x[seed % size] = 0.0
    action = int(distributions.categorical_sample(x, key))
    p = [math.exp(v) for v in (x - x.max()).tolist()]
    sought = random._open_unit(key, ()).item() * math.fsum(p)
    assert p[action] > 0
    assert math.fsum(p[:action]) <= sought * (1 + 1e-12)
    assert math.fsum(p[: action + 1]) >= sought * (1 - 1e-12)


@given(
    st.sampled_from([1, 2, 255, 256, 257, 512, 700, 1100]),
    seeds,
    st.floats(0, 30),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_log_prob_of_a_draw_is_that_of_the_action_drawn(size, seed, spread, dtype):
    impossible, values, key = random.split(random.key(seed), 3)
    x = spread * random.normal(values, (2, size)).to(dtype)
    x = torch.where(random.uniform(impossible, (2, size)) < 0.3, -math.inf, x)
    x[:, seed % size] = 0.0
    each, z = random.split(key), x - x.amax(-1, keepdim=True)
    actions, log_prob = distributions._sample_and_log_prob(z, each)
    assert torch.equal(actions, distributions.categorical_sample(x, each))
    expected = distributions.categorical_log_prob(z.double(), actions)
    rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (2e-7, 1e-14)
    close(log_prob, expected.to(dtype), rtol=rtol, atol=atol)
    own = vmap(distributions._sample_and_log_prob)(z, each)
    close((actions, log_prob), tuple(own), rtol=0, atol=0)


def test_the_log_prob_of_what_is_nearly_certain_keeps_its_digits():
    x = torch.tensor([-20.0, 0.0])
    action, log_prob = distributions._sample_and_log_prob(x, random.key(0))
    assert action == 1
    close(log_prob, torch.tensor(-math.log1p(math.exp(-20.0))), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_a_distribution_draws_the_first_action_and_spoils_no_other(value):
    x = torch.randn(3, 700)
    bad = x.clone()
    bad[1, 3] = value
    each = random.split(random.key(0), 3)
    (good, right), (draws, wrong) = (
        distributions._sample_and_log_prob(rows - rows.amax(-1, keepdim=True), each)
        for rows in (x, bad)
    )
    assert draws[1] == 0 and good[0] == draws[0] and good[2] == draws[2]
    assert wrong[1].isnan() and right[0] == wrong[0] and right[2] == wrong[2]


def test_an_action_of_probability_1e_9_can_be_drawn(monkeypatch):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(tuple(shape), 2**32 - 1))
    x = torch.tensor([0.0, -20.7])
    assert distributions.categorical_sample(x, random.key(0)) == 1


@given(logits, seeds)
def test_a_draw_depends_on_its_own_row_and_key_alone(pair, seed):
    x, _ = pair
    each = random.split(random.key(seed), len(x))
    draws = distributions.categorical_sample(x, each)
    noise = distributions.normal_sample(x, x.exp(), each)
    for i in range(len(x)):
        assert distributions.categorical_sample(x[i], each[i]) == draws[i]
        alone = distributions.normal_sample(x[i], x[i].exp(), each[i])
        close(noise[i], alone, rtol=0, atol=0)


@given(logits, logits)
def test_normal_is_the_one_of_torch(one, two):
    (mean, actions), ref_mean = one, one[1].flip(0)
    scale, ref_scale = (0.1 * mean).exp(), (0.1 * actions).exp()
    p, q = Normal(mean, scale), Normal(ref_mean, ref_scale)
    close(distributions.normal_log_prob(mean, scale, actions), p.log_prob(actions))
    close(distributions.normal_entropy(scale), p.entropy())
    close(distributions.normal_kl(mean, scale, ref_mean, ref_scale), kl_divergence(p, q))


def test_normal_samples_have_their_mean_and_scale_and_differentiate():
    mean, scale = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    draws = vmap(lambda key: distributions.normal_sample(mean, scale, key))(
        random.split(random.key(2), 100_000)
    )
    close(draws.mean(0), mean, rtol=0, atol=0.03)
    close(draws.std(0), scale, rtol=0.02, atol=0)
    close(grad(lambda m: distributions.normal_sample(m, scale, keys()).sum())(mean), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_entropies_and_kls_of_half_precision_are_the_float32_ones(dtype):
    x, y = torch.randn(3, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    s, t, a = x.exp(), y.exp(), torch.tensor([0, 4, 2])
    for f, args in (
        (distributions.categorical_log_prob, (x, a)),
        (distributions.categorical_entropy, (x,)),
        (distributions.categorical_kl, (x, y)),
        (distributions.normal_log_prob, (x, s, y)),
        (distributions.normal_entropy, (s,)),
        (distributions.normal_kl, (x, s, y, t)),
    ):
        wide = [z.float() if z.is_floating_point() else z for z in args]
        close(f(*args), f(*wide), rtol=0, atol=0)
    assert distributions.normal_sample(x, s, keys()).dtype == dtype
