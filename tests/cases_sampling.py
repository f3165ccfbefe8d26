"""What the tests of sampling kernels share: the ways to run, inputs, and floor 0's answer."""

import math

import pytest
import torch
from rlhf_kernels import cpu_sampling, rows, threefry

import rlhf_fn
from rlhf_fn.rollout import sampling_logits

PATHS = ["interpreter", "interpreter in small blocks", "cpu", "cpu in small blocks"]
SUPPORTS = [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}, {"top_k": 1}, {"top_p": 1e-9}]
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def small_blocks(number, vocab):
    """Several blocks for a row, the last one ragged."""
    block = 16 if vocab < 100 else 256
    return rows.Plan(block, 3 * block, -(-vocab // (3 * block)), 4)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """How a kernel runs where there is no GPU."""
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture
def cpu(monkeypatch):
    take("cpu", monkeypatch)


def take(path, monkeypatch):
    if "cpu" in path:
        monkeypatch.delenv("TRITON_INTERPRET")
    if "small" in path:
        monkeypatch.setattr(rows, "plan", small_blocks)
        monkeypatch.setattr(cpu_sampling, "BLOCK", 16)
        monkeypatch.setattr(cpu_sampling, "CACHED", 64)  # elements: a few rows at a time


def keys_for(*shape, seed=0):
    """One key for each row."""
    return rlhf_fn.random.split(rlhf_fn.random.key(seed), math.prod(shape)).view(*shape, 2)


def problem(*shape, dtype=torch.float32, seed=0):
    """Logits no two of which are equal in a row, whatever the dtype; [*shape[:-1], 2] keys."""
    torch.manual_seed(seed)
    x = torch.rand(shape).argsort(-1) / 8 - 2 if shape[-1] <= 64 else 3 * torch.randn(shape)
    return x.to(dtype), keys_for(*shape[:-1], seed=seed)


def drawn(x, keys, *, temperature, **support):
    """Floor 0's tokens, and their log-probs in float64."""
    z = sampling_logits(x, temperature=temperature, **support)
    y = rlhf_fn.categorical_sample(z, keys)
    return y, z.double().log_softmax(-1).gather(-1, y[..., None])[..., 0]


def ranked(x, keys, temperature=1.0, top_k=None, top_p=1.0):
    """The same of one row, in plain Python: of equals the support keeps those of lowest index."""
    z = [v / temperature for v in x.tolist()]
    order = sorted(range(len(z)), key=lambda v: (-z[v], v))[:top_k]
    goal = top_p * sum(math.exp(z[v]) for v in order)
    kept, mass = [], 0.0
    for v in order:
        if mass < goal:
            kept.append(v)
        mass += math.exp(z[v])
    total, below = sum(math.exp(z[v]) for v in kept), 0.0
    for y in sorted(kept):
        below += math.exp(z[y])
        if below > threefry.units(keys[None]).item() * total:
            break
    return y, z[y] - math.log(total)


def all_ranked(x, keys, **support):
    """`ranked` of rows."""
    tokens, logprobs = zip(*(ranked(row, key, **support) for row, key in zip(x, keys)))
    return torch.tensor(tokens), torch.tensor(logprobs, dtype=torch.float64)


def assert_drawn(sample, expected):
    """The same tokens, and log-probs to a few units in the last place of float32."""
    tokens, logprobs = expected
    assert sample.tokens.dtype == torch.int64
    assert sample.tokens.tolist() == tokens.tolist()
    wide = sample.logprobs.dtype == torch.float64
    assert sample.logprobs.dtype in (torch.float32, torch.float64)
    allowed = (1e-14 if wide else 1e-6) * (1 + logprobs.abs())
    assert ((sample.logprobs.double() - logprobs).abs() <= allowed).all()
