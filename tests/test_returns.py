import math

import pytest
import torch
from cases_ground import array
from cases_returns import trajectories, unit
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from rlhf_fn.returns import (
    discounted_returns,
    gae,
    lambda_returns,
    q_learning_error,
    td_error,
    vtrace,
)

# Slow oracles: one row with its hidden tokens cut out, as lists of floats, in order of time.


def loop_td(r, v, end, g, lam=None):
    return [r[t] + g * (v[t + 1] if t + 1 < len(v) else end) - v[t] for t in range(len(v))]


def loop_gae(r, v, end, g, lam):
    ahead, out = 0.0, []
    for delta in reversed(loop_td(r, v, end, g)):
        ahead = delta + g * lam * ahead
        out.insert(0, ahead)
    return out


def loop_returns(r, v, end, g, lam=None):
    return [
        sum(g ** (k - t) * r[k] for k in range(t, len(r))) + g ** (len(r) - t) * end
        for t in range(len(r))
    ]


def loop_lambda(r, v, end, g, lam):
    """The mean of n-step returns, with weights (1 − λ) λⁿ⁻¹ and the rest on the longest."""
    out = []
    for t in range(len(r)):
        longest = len(r) - t
        steps = [
            sum(g**k * r[t + k] for k in range(n)) + g**n * (v[t + n] if n < longest else end)
            for n in range(1, longest + 1)
        ]
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, longest)] + [lam ** (longest - 1)]
        out.append(sum(w * x for w, x in zip(weights, steps)))
    return out


def loop_vtrace(logp, old, r, v, end, g, lam, rho_bar, c_bar):
    """The paper's sum: vₛ = Vₛ + Σₜ γᵗ⁻ˢ (Π c) ρₜ δₜ, and the advantages of its §4.2."""
    ratio = [math.exp(a - b) for a, b in zip(logp, old)]
    rho, c = [min(rho_bar, x) for x in ratio], [lam * min(c_bar, x) for x in ratio]
    deltas = [w * d for w, d in zip(rho, loop_td(r, v, end, g))]
    vs = [
        v[s] + sum(g ** (t - s) * math.prod(c[s:t]) * deltas[t] for t in range(s, len(r)))
        for s in range(len(r))
    ]
    after = [*vs[1:], end]
    return [rho[t] * (r[t] + g * after[t] - v[t]) for t in range(len(r))], vs


def by_row(loop, tensors, mask, bootstrap, *hyper):
    """Run a loop on every row's kept tokens and put its results back, with 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, keep in enumerate(mask):
        rows = [x[i, keep].tolist() for x in tensors]
        out[i, keep] = torch.tensor(loop(*rows, bootstrap[i].item(), *hyper), dtype=torch.float64)
    return out


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


ORACLES = {
    "td_error": (
        lambda r, v, m, end, g, lam: td_error(r, v, m, discount=g, bootstrap=end),
        loop_td,
    ),
    "gae": (
        lambda r, v, m, end, g, lam: gae(r, v, m, discount=g, lam=lam, bootstrap=end).advantages,
        loop_gae,
    ),
    "discounted_returns": (
        lambda r, v, m, end, g, lam: discounted_returns(r, m, discount=g, bootstrap=end),
        loop_returns,
    ),
    "lambda_returns": (
        lambda r, v, m, end, g, lam: lambda_returns(r, v, m, discount=g, lam=lam, bootstrap=end),
        loop_lambda,
    ),
}
oracles = pytest.mark.parametrize("name", ORACLES)


@oracles
@given(trajectories(), unit, unit)
def test_it_is_a_loop_over_the_row_with_its_hidden_tokens_cut_out(name, case, discount, lam):
    rewards, values, mask, end = case
    function, loop = ORACLES[name]
    got = function(rewards, values, mask, end, discount, lam)
    close(got, by_row(loop, (rewards, values), mask, end, discount, lam))
    ended = function(rewards, values, mask, None, discount, lam)
    close(ended, by_row(loop, (rewards, values), mask, torch.zeros_like(end), discount, lam))


@oracles
@given(trajectories(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_it_never_reads_what_the_mask_hides_forward_or_backward(name, case, poison):
    rewards, values, mask, end = case

    def total(rewards, values):
        out = ORACLES[name][0](rewards, values, mask, end, 0.9, 0.8)
        return (out * torch.arange(1, out.numel() + 1).reshape(out.shape)).sum(), out

    def everything(rewards, values):
        return grad(total, (0, 1), has_aux=True)(rewards, values)

    dirty = [x.masked_fill(~mask, poison) for x in (rewards, values)]
    torch.testing.assert_close(everything(*dirty), everything(rewards, values), rtol=0, atol=0)


def test_gae_of_the_worked_example():
    mask = torch.tensor([True, True, False, False, True])
    rewards, values = torch.tensor(
        [[0, 0, 0, 0, 1], [0.2, 0.3, 0.9, 0.8, 0.5]], dtype=torch.float64
    )
    advantages, returns = gae(rewards, values, mask, discount=1.0, lam=0.95)
    close(advantages, torch.tensor([0.74125, 0.675, 0, 0, 0.5], dtype=torch.float64))
    close(returns, torch.tensor([0.94125, 0.975, 0, 0, 1], dtype=torch.float64))


@given(trajectories(), unit, unit)
def test_gae_returns_are_lambda_returns_and_advantages_plus_values(case, discount, lam):
    rewards, values, mask, end = case
    hyper = {"discount": discount, "lam": lam, "bootstrap": end}
    advantages, returns = gae(rewards, values, mask, **hyper)
    close(returns, lambda_returns(rewards, values, mask, **hyper))
    close(returns, advantages + torch.where(mask, values, 0.0))


@given(trajectories(), unit)
def test_gae_runs_from_the_td_error_to_the_return_less_the_value(case, discount):
    rewards, values, mask, end = case
    hyper = {"discount": discount, "bootstrap": end}
    close(
        gae(rewards, values, mask, lam=0.0, **hyper).advantages,
        td_error(rewards, values, mask, **hyper),
    )
    close(
        gae(rewards, values, mask, lam=1.0, **hyper).returns,
        discounted_returns(rewards, mask, **hyper),
    )


@given(trajectories(count=1), unit, st.integers(0, 9))
def test_a_row_cut_in_two_and_bootstrapped_is_the_row_uncut(case, discount, at):
    rewards, mask, end = case
    at = min(at, mask.shape[-1] - 1)
    whole = discounted_returns(rewards, mask, discount=discount, bootstrap=end)
    rest = discounted_returns(rewards[:, at:], mask[:, at:], discount=discount, bootstrap=end)
    first = mask[:, at:].int().argmax(-1, keepdim=True)
    after = torch.where(mask[:, at:].any(-1), rest.gather(-1, first)[:, 0], end)
    head = discounted_returns(rewards[:, :at], mask[:, :at], discount=discount, bootstrap=after)
    close(torch.cat([head, rest], -1), whole)


vtraces = trajectories(count=4)
clips = st.floats(0, 3)


@given(vtraces, unit, unit, clips, clips)
def test_vtrace_is_the_papers_sum(case, discount, lam, rho, c):
    *tensors, mask, end = case
    got = vtrace(*tensors, mask, discount=discount, lam=lam, clip_rho=rho, clip_c=c, bootstrap=end)
    for i in (0, 1):
        loop = lambda *row, i=i: loop_vtrace(*row)[i]  # noqa: E731
        close(got[i], by_row(loop, tensors, mask, end, discount, lam, rho, c))


@given(trajectories(count=3), unit, unit, st.floats(1, 3), st.floats(1, 3))
def test_vtrace_on_policy_is_lambda_returns(case, discount, lam, rho, c):
    logprobs, rewards, values, mask, end = case
    hyper = {"discount": discount, "lam": lam, "bootstrap": end}
    on_policy = vtrace(logprobs, logprobs, rewards, values, mask, clip_rho=rho, clip_c=c, **hyper)
    close(on_policy.returns, lambda_returns(rewards, values, mask, **hyper))


@given(vtraces, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_vtrace_never_reads_what_the_mask_hides_forward_or_backward(case, poison):
    *tensors, mask, end = case

    def everything(*tensors):
        def total(*tensors):
            out = vtrace(*tensors, mask, discount=0.9, clip_rho=1.3, clip_c=1.1, bootstrap=end)
            return (out.advantages + out.returns.sin()).sum(), out

        return grad(total, (0, 1, 2, 3), has_aux=True)(*tensors)

    dirty = [x.masked_fill(~mask, poison) for x in tensors]
    torch.testing.assert_close(everything(*dirty), everything(*tensors), rtol=0, atol=0)


def test_vtrace_is_finite_with_its_gradient_however_far_off_policy():
    logprobs, old = torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0])
    ones, mask = torch.ones(2), torch.tensor([True, True])
    f = lambda x: vtrace(x, old, ones, ones, mask, discount=0.9, clip_rho=1.0, clip_c=1.0)  # noqa: E731
    assert f(logprobs).advantages.isfinite().all()
    assert grad(lambda x: f(x).returns.sum())(logprobs).isfinite().all()


@st.composite
def choices(draw):
    """Q-values and their targets `[batch, time, actions]`, actions, rewards, mask, bootstrap."""
    rewards, mask, end = draw(trajectories(count=1))
    q, target = (draw(array(*mask.shape, 3)) for _ in range(2))
    actions = draw(array(*mask.shape, elements=st.integers(0, 2), dtype=torch.long))
    return q, target, actions, rewards, mask, end


@given(choices(), unit)
def test_q_learning_error_is_that_of_a_loop(case, discount):
    q, target, actions, rewards, mask, end = case
    chosen = torch.tensor(
        [[q[i, t, a] for t, a in enumerate(row)] for i, row in enumerate(actions.tolist())]
    ).double()
    best = torch.tensor([[max(x) for x in row] for row in target.tolist()]).double()

    def loop(r, q, best, end):
        after = [*best[1:], end]
        return [r[t] + discount * after[t] - q[t] for t in range(len(r))]

    got = q_learning_error(q, target, actions, rewards, mask, discount=discount, bootstrap=end)
    close(got, by_row(loop, (rewards, chosen, best), mask, end))


@given(choices(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_q_learning_error_never_reads_what_the_mask_hides_forward_or_backward(case, poison):
    q, target, actions, rewards, mask, end = case

    def everything(q, target, rewards, actions):
        def total(q, target, rewards):
            out = q_learning_error(q, target, actions, rewards, mask, discount=0.9, bootstrap=end)
            return out.sum(), out

        return grad(total, (0, 1, 2), has_aux=True)(q, target, rewards)

    hidden = ~mask
    dirty = [x.masked_fill(hidden[..., None], poison) for x in (q, target)]
    rewards_, actions_ = rewards.masked_fill(hidden, poison), actions.masked_fill(hidden, -100)
    torch.testing.assert_close(
        everything(*dirty, rewards_, actions_), everything(q, target, rewards, actions)
    )


def test_misuse_is_named():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="values"):
        gae(x, x[:, :2], mask, discount=1.0, lam=1.0)
    with pytest.raises(TypeError, match="mask"):
        gae(x, x, mask.float(), discount=1.0, lam=1.0)
    with pytest.raises(ValueError, match="discount"):
        discounted_returns(x, mask, discount=1.1)
    with pytest.raises(ValueError, match="lam"):
        lambda_returns(x, x, mask, discount=1.0, lam=-0.1)
    with pytest.raises(ValueError, match=r"bootstrap \(2, 3\)"):
        td_error(x, x, mask, discount=1.0, bootstrap=x)
    with pytest.raises(ValueError, match=r"actions\[0, 0\] is 7"):
        q_learning_error(x[..., None], x[..., None], x.long() + 7, x, mask, discount=1.0)
    with pytest.raises(ValueError, match="clip_rho"):
        vtrace(x, x, x, x, mask, discount=1.0, clip_rho=-1.0, clip_c=1.0)
