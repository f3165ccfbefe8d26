"""Adapters on tiny models, and the equation by hand: what the tests of adapters share."""

import tiny
import torch
from transformers.pytorch_utils import Conv1D

from rlhf_fn import random
from rlhf_fn.lora import Lora, all_linear, by_rank, lora
from rlhf_fn.models import causal_lm


def rows():
    """Left padding, right padding, none, and a row of padding alone."""
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5, [0] * 5]) > 0
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, tiny.VOCAB, attention.shape, generator=generator), attention


ROWS, KEY = rows(), random.key(0)


def everything(module, rank=3, alpha=4.0, scale=by_rank):
    return Lora(rank, alpha, all_linear(module), scale)


def drawn(adapter, seed=0):
    """An adapter of the same shapes that changes something."""
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(x.shape, generator=generator).to(x) for n, x in adapter.items()}


def tuned(family, **options):
    """(module, base, low_rank, apply of an adapter, an adapter)"""
    module = tiny.tiny(family)
    base, low_rank = causal_lm(module), everything(module, **options)
    apply, adapter = lora(causal_lm, module, base.params, low_rank, KEY)
    return module, base, low_rank, apply, drawn(adapter)


def by_hand(module, params, adapter, s):
    """W + s B A, entry by entry of the equation, and ∂W'/∂W as a function of gradients."""
    out = dict(params)
    for name, layer in module.named_modules():
        if f"{name}.lora_A.weight" in adapter:
            a, b = (adapter[f"{name}.lora_{x}.weight"] for x in "AB")
            change = s * torch.einsum("or,ri->oi", b, a)
            out[f"{name}.weight"] = params[f"{name}.weight"] + (
                change.T if isinstance(layer, Conv1D) else change
            )
    return out


def pull(logits):
    """A scalar of logits with a different slope at each."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
