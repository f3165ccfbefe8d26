"""The divergence between two projections in plain torch, as `linear_cpu.py` has one of them."""

import torch

from rlhf_kernels import cpu, formulas, rows
from rlhf_kernels import linear_tiles as tiles
from rlhf_kernels.linear_cpu import chunks, logits, projected, through

# the formula, and its gradients


def divergence(h, w, hq, wq, scale, cap, memory):
    """KL(π ‖ ρ)."""
    logp, logq = _both(h, w, hq, wq, scale, cap)
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0.0)).sum(-1)


def gradient(h, w, hq, wq, scale, cap, memory, *others):
    """The gradients in h and W or in those of ρ; the hints among the arguments are not read."""
    *_, g, of_reference, of_h, of_w = others
    logp, logq = _both(h, w, hq, wq, scale, cap)
    p = logp.exp()
    if of_reference:
        dx, h, w = logq.exp() - p, hq, wq
    else:
        ratio = torch.where(p > 0, logp - logq, 0.0)
        dx = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    dx = g[..., None] * dx * formulas.slope(projected(h, w, None), scale, cap)
    return through(dx, h, w, None, (of_h, of_w, False))[:2]


def _both(h, w, hq, wq, scale, cap):
    each = projected(h, w, None), projected(hq, wq, None)
    return (formulas.tempered(x, scale, cap).log_softmax(-1) for x in each)


# the path on a CPU


def merged(c, s, cq, r, d, t):
    """(KL, c, log Σ e^u, c', log Σ e^o) of the sums of parts of the vocabulary, [rows, parts]."""
    t = 1.0 if t is None else t
    top, top_q = c.amax(-1, keepdim=True), cq.amax(-1, keepdim=True)
    step, step_q = (c - top) * t, (cq - top_q) * t
    d = torch.where(s > 0, (d + (step - step_q) * s) * step.exp(), 0.0).sum(-1)
    s, r = (s * step.exp()).sum(-1), (r * step_q.exp()).sum(-1)
    return d / s - (s.log() - r.log()), top[:, 0], s.log(), top_q[:, 0], r.log()


def forward(h, w, hq, wq, scale, cap, memory):
    """(KL, c, log Σ e^u, c', log Σ e^o)."""
    wide = rows.accumulator(h)
    parts = []
    for at in chunks(h, w, memory // 2):
        both = (logits(x.to(wide), weight, None, at) for x, weight in ((h, w), (hq, wq)))
        parts.append(cpu.by_rows(_divergences, *both, scale, cap=cap))
    sums = (torch.stack(each, -1) for each in zip(*parts))
    return merged(*sums, None if scale is None else scale[:, None])


def backward(h, w, hq, wq, scale, cap, memory, *others):
    """The gradients in h and W, or in those of ρ, of the rows that have an upstream gradient."""
    *per_row, g, of_reference, of_h, of_w = others
    read, wide = g != 0, rows.accumulator(h)
    scale = None if scale is None else scale[read]
    per_row = [x[read] for x in (*per_row, g)]
    both = (h.to(wide)[read], w), (hq.to(wide)[read], wq)
    left, right = (hq, wq) if of_reference else (h, w)

    def parts():
        for at in chunks(h, w, memory // 2):
            x, q = (logits(*each, None, at) for each in both)
            function = _dq if of_reference else _dp
            yield at, cpu.by_rows(function, x, q, scale, *per_row, cap=cap)[0]

    dh, dw, _ = tiles.gradients(both[of_reference][0], right, None, parts(), (of_h, of_w, False))
    if of_h:
        dh = torch.zeros_like(left).index_put_((read,), dh)
    return dh, dw


def _divergences(x, q, scale, cap):
    c, cq = (formulas.capped(each, cap).amax(-1).clamp(min=-1e38) for each in (x, q))
    u, o = cpu.centred(x, scale, c, cap), cpu.centred(q, scale, cq, cap)
    e = u.exp()
    return c, e.sum(-1), cq, o.exp().sum(-1), torch.where(e > 0, e * (u - o), 0.0).sum(-1)


def _dp(x, q, scale, kl, c, total, cq, total_q, g, cap):
    p, log_ratio = cpu.ratio(x, q, scale, c, total, cq, total_q, cap)
    dx = torch.where(p > 0, g[:, None] * p * (log_ratio - kl[:, None]), 0.0)
    return (dx * formulas.slope(x, scale, cap),)


def _dq(x, q, scale, kl, c, total, cq, total_q, g, cap):
    p = (cpu.centred(x, scale, c, cap) - total[:, None]).exp()
    r = (cpu.centred(q, scale, cq, cap) - total_q[:, None]).exp()
    return (g[:, None] * (r - p) * formulas.slope(q, scale, cap),)
