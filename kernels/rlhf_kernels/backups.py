"""One pass over trajectories: the scan behind their returns, its gradient, and the operator.

Rₜ = rₜ + n(t⁺),   nₜ = γ Vₜ + γλ Aₜ,   Aₜ = Rₜ − Vₜ

t⁺ is the next kept token after t: n is all that a token tells the one before it, so a single scan
gives both outputs, and a hidden token passes n on. Past the last kept token n is γ `bootstrap`.
With upstream gradients gA and gR, and t⁻ the kept token before t, backward is a scan the other way:

hₜ = gAₜ + gRₜ + γλ h(t⁻),   ∂rₜ = hₜ,   ∂Vₜ = (γ − γλ) h(t⁻) − gAₜ,   ∂bootstrap = γ h(last)
"""

from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import cpu_scans, rows
from rlhf_kernels.registration import differentiable, operator
from rlhf_kernels.scans import carried_on, options, strided, then

# the kernels: some rows per program; each lane first has what the lane before it does to the state,
# which is what reaches it, and then hands on its own


@triton.jit
def _rates(discounts, decays, row, rows, DISCOUNT: tl.constexpr, DECAY: tl.constexpr,
           ACC: tl.constexpr):  # fmt: skip
    """γ and γλ: numbers for all rows, or one of each for every row."""
    if discounts is None:
        discount, decay = tl.full([1, 1], DISCOUNT, ACC), tl.full([1, 1], DECAY, ACC)
    else:
        discount = tl.load(discounts + row, mask=row < rows, other=0.0).to(ACC)
        decay = tl.load(decays + row, mask=row < rows, other=0.0).to(ACC)
    return discount, decay


@triton.jit
def _kept(mask, row, stride, t, step, there):
    return tl.load(mask + row * stride + t * step, mask=there, other=0) != 0


@triton.jit
def _read(x, row, stride, t, step, kept, ACC: tl.constexpr):
    """x, and 0 where it is hidden, which is not read."""
    return tl.load(x + row * stride + t * step, mask=kept, other=0.0).to(ACC)


@triton.jit
def _backup(rewards, r_row, r_step, values, v_row, v_step, mask, m_row, m_step, bootstrap,
            discounts, decays, advantages, returns, rows, time, DISCOUNT: tl.constexpr,
            DECAY: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    discount, decay = _rates(discounts, decays, row, rows, DISCOUNT, DECAY, ACC)
    state = tl.zeros([ROWS, 1], ACC)
    if bootstrap is not None:
        state = discount * tl.load(bootstrap + row, mask=row < rows, other=0.0).to(ACC)
    for start in range(0, time, BLOCK):
        t = time - 1 - (start + lane).to(tl.int64)
        there = (row < rows) & (t >= 0)
        kept = _kept(mask, row, m_row, t + 1, m_step, there & (lane > 0))
        n = decay * _read(rewards, row, r_row, t + 1, r_step, kept, ACC)
        if values is not None:
            n += (discount - decay) * _read(values, row, v_row, t + 1, v_step, kept, ACC)
        through, n = tl.associative_scan((tl.where(kept, decay, 1.0), n), 1, then)
        n += through * state
        kept = _kept(mask, row, m_row, t, m_step, there)
        out = tl.where(kept, n + _read(rewards, row, r_row, t, r_step, kept, ACC), 0.0)
        tl.store(returns + row * time + t, out, mask=there)
        told = decay * out
        if values is not None:
            v = _read(values, row, v_row, t, v_step, kept, ACC)
            tl.store(advantages + row * time + t, out - v, mask=there)
            told += (discount - decay) * v
        state = carried_on(tl.where(kept, told, n), BLOCK)


@triton.jit
def _gradient(g_returns, r_row, r_step, g_advantages, a_row, a_step, mask, m_row, m_step,
              discounts, decays, d_rewards, d_values, d_bootstrap, rows, time,
              DISCOUNT: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    discount, decay = _rates(discounts, decays, row, rows, DISCOUNT, DECAY, ACC)
    state = tl.zeros([ROWS, 1], ACC)
    for start in range(0, time, BLOCK):
        t = (start + lane).to(tl.int64)
        there = (row < rows) & (t < time)
        # the lane after the last token's is read too: it has the bootstrap's
        kept = _kept(mask, row, m_row, t - 1, m_step, (row < rows) & (t <= time) & (lane > 0))
        h = _read(g_returns, row, r_row, t - 1, r_step, kept, ACC)
        if g_advantages is not None:
            h += _read(g_advantages, row, a_row, t - 1, a_step, kept, ACC)
        through, h = tl.associative_scan((tl.where(kept, decay, 1.0), h), 1, then)
        h += through * state
        kept = _kept(mask, row, m_row, t, m_step, there)
        out = decay * h + _read(g_returns, row, r_row, t, r_step, kept, ACC)
        if g_advantages is not None:
            g = _read(g_advantages, row, a_row, t, a_step, kept, ACC)
            d = tl.where(kept, (discount - decay) * h - g, 0.0)
            tl.store(d_values + row * time + t, d, mask=there)
            out += g
        tl.store(d_rewards + row * time + t, tl.where(kept, out, 0.0), mask=there)
        state = carried_on(tl.where(kept, out, h), BLOCK)
    tl.store(d_bootstrap + row, discount * state, mask=row < rows)


# the launches


def _launch_forward(rewards, values, mask, bootstrap, discounts, decays, discount, decay):
    outputs = _backup_like(rewards, values)
    if rewards.numel():
        inputs = (strided(each) for each in (rewards, values, mask.view(torch.uint8)))
        per_row = (_flat(each) for each in (bootstrap, discounts, decays))
        shape, grid, chosen = options(rewards)
        chosen |= {"DISCOUNT": discount, "DECAY": decay}
        _backup[grid](*sum(inputs, ()), *per_row, *outputs, *shape, **chosen)
    return outputs


def _launch_backward(g_returns, g_advantages, mask, discounts, decays, discount, decay):
    outputs = _gradient_like(g_returns, g_advantages)
    if not g_returns.numel():
        return *outputs[:2], outputs[2].zero_()
    inputs = (strided(each) for each in (g_returns, g_advantages, mask.view(torch.uint8)))
    per_row = (_flat(each) for each in (discounts, decays))
    shape, grid, chosen = options(g_returns)
    chosen |= {"DISCOUNT": discount, "DECAY": decay}
    _gradient[grid](*sum(inputs, ()), *per_row, *outputs, *shape, **chosen)
    return outputs


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _backup_like(rewards: Tensor, values: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    shape = (*rewards.shape[:-1], 0) if values is None else rewards.shape
    return rewards.new_empty(shape), rewards.new_empty(rewards.shape)


def _gradient_like(g_returns: Tensor, g_advantages: Tensor | None, *_) -> tuple[Tensor, ...]:
    d_values, d_rewards = _backup_like(g_returns, g_advantages)
    return d_rewards, d_values, g_returns.new_empty(g_returns.shape[:-1])


# the operators; `discounts` and `decays` have γ and γλ of each row, else the numbers are for all

_RATES = "Tensor? discounts, Tensor? decays, float discount, float decay"
_GRADIENT = operator(
    f"backup_gradient(Tensor g_returns, Tensor? g_advantages, Tensor mask, {_RATES})"
    " -> (Tensor, Tensor, Tensor)",
    rows.dispatch(_launch_backward, cpu_scans.backup_backward),
    _gradient_like,
)
_BACKUP = operator(
    f"backup(Tensor rewards, Tensor? values, Tensor mask, Tensor? bootstrap, {_RATES})"
    " -> (Tensor, Tensor)",
    rows.dispatch(_launch_forward, cpu_scans.backup_forward),
    _backup_like,
)


def _backup_gradients(args, out, up, wanted):
    g_advantages = None if args[1] is None else up[0]
    return _GRADIENT(up[1], g_advantages, args[2], *args[4:])


def _gradient_gradients(args, out, up, wanted):
    """Of a linear map's transpose: the map."""
    values = None if args[1] is None else up[1]
    return _BACKUP(up[0], values, args[2], up[2], *args[3:])[::-1]


differentiable(_BACKUP, cpu_scans.backup, {(0, 1, 3): _backup_gradients})
differentiable(_GRADIENT, cpu_scans.backup_gradient, {(0, 1): _gradient_gradients})


def backup(
    rewards: Tensor, values: Tensor | None, mask: Tensor, bootstrap: Tensor | None,
    discount: float | Tensor, lam: float | Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(A, R) for γ and λ that are numbers, or tensors with one for each row, `[*batch, 1]`.

    Without values V is 0, and A is left out: it has no time.
    """
    given = [x for x in (rewards, values, bootstrap) if x is not None]
    dtype = reduce(torch.promote_types, (x.dtype for x in given))
    rewards, values, bootstrap = (
        x if x is None else x.to(dtype) for x in (rewards, values, bootstrap)
    )
    rates = discount, discount * lam
    if not isinstance(rates[1], Tensor):
        return _BACKUP(rewards, values, mask, bootstrap, None, None, *map(float, rates))

    wide = rows.accumulator(rewards)

    def one_each(rate: float | Tensor) -> Tensor:
        x = rate if isinstance(rate, Tensor) else rewards.new_full((1,), rate, dtype=wide)
        return x.to(rewards.device, wide).expand(*mask.shape[:-1], 1).squeeze(-1)

    return _BACKUP(rewards, values, mask, bootstrap, *map(one_each, rates), 1.0, 1.0)
