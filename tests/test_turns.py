"""Laws of turns.py and mpo.py, on ragged rows with tokens of other speakers between turns."""

import math

import pytest
import torch
from cases_ground import array
from cases_groups import ragged
from cases_losses import refused
from cases_returns import trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.mpo import kl_constraint, mpo_temperature_loss, mpo_weights
from rlhf_fn.returns import gae
from rlhf_fn.turns import length_adaptive_lam, turn_gae, turn_starts, turn_sum

close = torch.testing.assert_close
temperatures = st.floats(0.1, 5)


@st.composite
def conversations(draw, count):
    """`trajectories` and a turn number for every token, hidden ones too."""
    *tensors, mask, bootstrap = draw(trajectories(count=count))
    steps = draw(array(*mask.shape, elements=st.sampled_from([0, 0, 1, 2]), dtype=torch.int64))
    return *tensors, steps.cumsum(-1) % 4, mask, bootstrap


def turns_of(turns, mask):
    """The positions of each turn of one row."""
    found = []
    for t, (turn, keep) in enumerate(zip(turns.tolist(), mask.tolist())):
        if keep and found and turns[found[-1][-1]] == turn:
            found[-1].append(t)
        elif keep:
            found.append([t])
    return found


@given(conversations(count=1))
def test_turns_start_and_sum_as_in_their_loop(case):
    x, turns, mask, _ = case
    starts, sums = turn_starts(turns, mask), torch.zeros_like(x)
    for i in range(len(x)):
        found = turns_of(turns[i], mask[i])
        assert starts[i].nonzero().flatten().tolist() == [turn[0] for turn in found]
        for turn in found:
            sums[i, turn] = x[i, turn].sum()
    close(turn_sum(x, turns, mask), sums, rtol=1e-9, atol=1e-9)


@given(conversations(count=2), unit, unit)
def test_turn_gae_is_the_loop_over_turns(case, discount, lam):
    rewards, values, turns, mask, bootstrap = case
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for i in range(len(rewards)):
        ahead, following = 0.0, bootstrap[i]
        for turn in reversed(turns_of(turns[i], mask[i])):
            value = values[i, turn[0]]
            delta = rewards[i, turn].sum() + discount * following - value
            ahead, following = delta + discount * lam * ahead, value
            advantages[i, turn], returns[i, turn] = ahead, ahead + value
    got = turn_gae(rewards, values, turns, mask, discount=discount, lam=lam, bootstrap=bootstrap)
    close(got.advantages, advantages, rtol=1e-7, atol=1e-7)
    close(got.returns, returns, rtol=1e-7, atol=1e-7)


@given(trajectories(), unit, unit)
def test_turn_gae_of_one_token_turns_is_gae(case, discount, lam):
    rewards, values, mask, bootstrap = case
    settings = {"discount": discount, "lam": lam, "bootstrap": bootstrap}
    each = torch.arange(mask.shape[1]).expand(mask.shape)
    close(turn_gae(rewards, values, each, mask, **settings), gae(rewards, values, mask, **settings))


@given(trajectories(), unit)
def test_turn_gae_of_one_turn_is_the_whole_reward_above_the_first_value(case, lam):
    rewards, values, mask, _ = case
    one = torch.zeros_like(mask, dtype=torch.long)
    got = turn_gae(rewards, values, one, mask, discount=1.0, lam=lam)
    total = torch.where(mask, rewards, 0.0).sum(-1, keepdim=True)
    first = values.gather(1, mask.int().argmax(1, keepdim=True))
    close(got.advantages, torch.where(mask, total - first, 0.0))
    close(got.returns, torch.where(mask, total, 0.0))


@given(trajectories(count=0), st.floats(0.01, 5))
def test_length_adaptive_lam_sums_to_alpha_times_the_length(case, alpha):
    mask, _ = case
    lam = length_adaptive_lam(mask, alpha=alpha, dtype=torch.float64)
    for got, length in zip(lam[:, 0].tolist(), mask.sum(-1).clamp(min=1).tolist()):
        assert got == pytest.approx(max(0.0, 1 - 1 / (alpha * length)))
        if got > 0:
            assert 1 / (1 - got) == pytest.approx(alpha * length)
    rewards = mask.double()
    gae(rewards, rewards, mask, discount=1.0, lam=lam)  # a λ per row


@given(ragged(), temperatures)
def test_mpo_weights_are_the_softmax_of_the_kept(case, temperature):
    rewards, mask = case
    got = mpo_weights(rewards, mask, temperature=temperature)
    for out, row, keep in zip(got, rewards, mask):
        powers = [math.exp(r / temperature) for r in row[keep].tolist()]
        assert out[keep].tolist() == pytest.approx([p / sum(powers) for p in powers])
        assert (out[~keep] == 0).all()
    close(mpo_weights(rewards, temperature=temperature), (rewards / temperature).softmax(-1))


@given(ragged(), temperatures, st.floats(0.01, 1))
def test_mpo_temperature_loss_is_its_loop(case, temperature, bound):
    rewards, mask = case
    eta = torch.tensor(temperature, dtype=torch.float64)
    got = mpo_temperature_loss(eta, rewards, mask, bound=bound)
    for out, row, keep in zip(got.tolist(), rewards, mask):
        powers = [math.exp(r / temperature) for r in row[keep].tolist()]
        mean = sum(powers) / max(1, len(powers))
        expected = temperature * (bound + math.log(mean)) if powers else 0.0
        assert out == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(ragged(), temperatures, st.floats(0.01, 1))
def test_the_temperature_settles_where_the_weights_are_as_far_from_uniform_as_the_bound(
    case, temperature, bound
):
    rewards, mask = case
    eta = torch.full((len(rewards),), temperature, dtype=torch.float64)
    slope = grad(lambda t: mpo_temperature_loss(t, rewards, mask, bound=bound).sum())(eta)
    weights = mpo_weights(rewards, mask, temperature=temperature)
    number = mask.sum(-1, keepdim=True).clamp(min=1)
    kl = torch.where(weights > 0, weights * (weights * number).log(), 0.0).sum(-1)
    expected = torch.where(mask.any(-1), bound - kl, 0.0)
    close(slope, expected, rtol=1e-7, atol=1e-7)


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0.01, 1))
def test_kl_constraint_lowers_the_kl_and_raises_its_price_above_the_bound(price, kl, bound):
    inputs = [torch.tensor(x, dtype=torch.float64) for x in (price, kl)]
    value = kl_constraint(*inputs, bound=bound)
    assert value.item() == pytest.approx(price * bound)
    of_price, of_kl = grad(lambda a, d: kl_constraint(a, d, bound=bound), (0, 1))(*inputs)
    assert of_price.item() == pytest.approx(bound - kl) and of_kl.item() == price


def test_turns_and_weights_refuse_what_does_not_fit_by_name():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with refused("turns must hold integers", TypeError):
        turn_starts(x, mask)
    with refused("turns"):
        turn_sum(x, ids[0], mask)
    with refused("values"):
        turn_gae(x, x[0], ids, mask, discount=1.0, lam=1.0)
    with refused("alpha must be"):
        length_adaptive_lam(mask, alpha=0.0)
    with refused("temperature must be"):
        mpo_weights(x, temperature=0.0)
    with refused("bound must be"):
        mpo_temperature_loss(torch.ones(()), x, bound=0.0)
    with refused("multiplier must be"):
        kl_constraint(x - 1, x, bound=0.1)
