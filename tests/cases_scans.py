"""What the tests of the scans share: the functions, floor 0's, and trajectories to run them on."""

from functools import partial

import pytest
import rlhf_kernels as ours
import torch
from rlhf_kernels import cpu_scans, scans

import rlhf_fn as floor

RATES = {"discount": 0.97, "lam": 0.9}
CLIPS = {"clip_rho": 1.2, "clip_c": 1.05}
# name -> (keywords, how many tensors it takes before the mask)
FUNCTIONS = {
    "suffix_scan": ({}, 2),
    "gae": (RATES, 2),
    "discounted_returns": ({"discount": 0.97}, 1),
    "vtrace": (RATES | CLIPS, 4),
}
MASKED = [name for name in FUNCTIONS if name != "suffix_scan"]


def small_tiles(number, time):
    return {"ROWS": 2, "BLOCK": 4, "num_warps": 1}


@pytest.fixture(params=["interpreter", "cpu"])
def path(request, monkeypatch):
    """How a scan runs where there is no GPU: interpreted, in small tiles, or in short strips."""
    if request.param == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(cpu_scans, "FEW", 1)
        monkeypatch.setattr(cpu_scans, "STRIP", 4)
        monkeypatch.setattr(cpu_scans, "CACHED", 8)
    else:
        monkeypatch.setattr(scans, "plan", small_tiles)
    return request.param


def trajectories(*shape, dtype=torch.float64, hidden=0.4, offset=0.0):
    """Four tensors, a ragged mask with a full and an empty row, and a bootstrap."""
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    tensors[1] = tensors[1] + offset
    mask = torch.rand(shape) > hidden
    rows = mask.flatten(0, -2) if len(shape) > 1 else mask[None]
    rows[1:2], rows[2:3] = True, False
    end = torch.randn(shape[:-1], dtype=torch.float64) + offset
    return [x.to(dtype) for x in tensors], mask, end.to(dtype)


def outputs(module, name, tensors, mask, bootstrap, **changed):
    """The outputs of a function of `module`, as a tuple."""
    keywords, count = FUNCTIONS[name]
    if name == "suffix_scan":
        return (module.suffix_scan(tensors[0], tensors[1].clamp(-0.9, 0.9)),)
    keywords = keywords | {"bootstrap": bootstrap} | changed
    out = getattr(module, name)(*tensors[:count], mask, **keywords)
    return tuple(out) if isinstance(out, tuple) else (out,)


def mixture(outs):
    """One number, to which every output contributes differently."""
    return sum(
        (out * torch.arange(i, out.numel() + i).reshape(out.shape).sin()).sum()
        for i, out in enumerate(outs, start=1)
    )


def gradients(module, name, tensors, mask, bootstrap, **changed):
    """Of the mixture, in every tensor and in the bootstrap, where there is one."""
    leaves = [x.detach().requires_grad_() for x in (*tensors, bootstrap) if x is not None]
    end = None if bootstrap is None else leaves[-1]
    outs = outputs(module, name, leaves[: len(tensors)], mask, end, **changed)
    return torch.autograd.grad(mixture(outs), leaves, allow_unused=True, materialize_grads=True)


kernel, formula = (partial(outputs, module) for module in (ours, floor))


def loop(rewards, values, mask, bootstrap, *, discount, lam):
    """Advantages and returns in float64, a token at a time from the end."""
    rewards, values = rewards.double(), values.double()
    ahead, after = torch.zeros_like(rewards[..., :1].sum(-1)), bootstrap.double()
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[..., t] + discount * after - values[..., t]
        kept = mask[..., t]
        ahead = torch.where(kept, delta + discount * lam * ahead, ahead)
        after = torch.where(kept, values[..., t], after)
        advantages[..., t] = torch.where(kept, ahead, 0.0)
    return advantages, advantages + torch.where(mask, values, 0.0)
