"""Who races: ours, floor 0, what a user would write, and the peers that are installed.

`{name: function}` of logits and tokens for each quantity; where a peer is missing, the reason
stands in for its function.
"""

from collections.abc import Callable
from importlib import metadata

import bench  # before the packages: it finds the checkout
import rlhf_kernels
import torch
import torch.nn.functional as F

import rlhf_fn

Contenders = dict[str, Callable | str]
OVERWRITES = {"Liger cross entropy"}  # the logits, with their gradient


def logprobs(machine: bench.Machine) -> Contenders:
    """log π(y), `[rows]`, of (logits, tokens)."""
    return {
        "ours": rlhf_kernels.token_logprobs,
        "floor 0": rlhf_fn.token_logprobs,
        "floor 0, compiled": machine.compiled(rlhf_fn.token_logprobs),
        "F.cross_entropy": lambda x, y: -F.cross_entropy(x, y, reduction="none"),
        "TRL": _peer(_trl),
        "Liger selective": _peer(_liger_selective),
        "Liger cross entropy": _peer(_liger_cross_entropy),
        "QuACK": _peer(_quack),
        "flash-attn": _peer(_flash_attn),
    }


def logprobs_and_entropy(machine: bench.Machine) -> Contenders:
    """(log π(y), H) of (logits, tokens)."""

    def plain(x, y):
        return rlhf_fn.token_logprobs(x, y), rlhf_fn.entropy(x)

    return {
        "ours": rlhf_kernels.token_logprobs_and_entropy,
        "floor 0": plain,
        "floor 0, compiled": machine.compiled(plain),
        "TRL": _peer(_trl_entropy),
    }


def kl(machine: bench.Machine) -> Contenders:
    """KL(π ‖ π_ref), and with log π(y) and H in one pass, of (logits, ref_logits, tokens)."""

    def plain(x, q, y):
        return rlhf_fn.full_kl(x, q)

    return {
        "ours": lambda x, q, y: rlhf_kernels.full_kl(x, q),
        "ours, with log π and H": rlhf_kernels.token_logprobs_and_kl,
        "floor 0": plain,
        "floor 0, compiled": machine.compiled(plain),
    }


def sampling(machine: bench.Machine) -> Contenders:
    """A token of each row, and its log-probability, of (logits, keys)."""

    def plain(x, keys):
        z = x / 0.9
        drawn = rlhf_fn.categorical_sample(z, keys)
        return drawn, rlhf_fn.token_logprobs(z, drawn)

    def multinomial(x, keys):
        p = (x.float() / 0.9).softmax(-1)
        drawn = p.multinomial(1)
        return drawn, p.gather(-1, drawn).log()

    ours = getattr(rlhf_kernels, "sample", None)
    likeliest = getattr(rlhf_kernels, "greedy", None)
    missing = "rlhf_kernels has none"
    return {
        "ours": (lambda x, keys: ours(x, keys, temperature=0.9)) if ours else missing,
        "ours, top-k 50": _within(ours, top_k=50) if ours else missing,
        "ours, top-p 0.95": _within(ours, top_p=0.95) if ours else missing,
        "ours, greedy": (lambda x, keys: likeliest(x)) if likeliest else missing,
        "floor 0": plain,
        "floor 0, compiled": machine.compiled(plain),
        "softmax + multinomial": multinomial,
    }


def _within(ours: Callable, **support) -> Callable:
    return lambda x, keys: ours(x, keys, temperature=0.9, **support)


def installed() -> dict[str, str]:
    """The peers' versions, or why they do not race."""
    loaders = {
        "trl": _trl,
        "liger-kernel": _liger_selective,
        "quack-kernels": _quack,
        "flash-attn": _flash_attn,
    }
    found = {name: _peer(load) for name, load in loaders.items()}
    return {n: f if isinstance(f, str) else metadata.version(n) for n, f in found.items()}


def _peer(load: Callable[[], Callable]) -> Callable | str:
    try:
        return load()
    except Exception as error:  # peers raise all sorts of things where they cannot be imported
        return bench.said(error)


def _trl() -> Callable:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _trl_entropy() -> Callable:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def _liger_selective() -> Callable:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # it leaves out the last of its rows
    return lambda x, y: fused_selective_log_softmax(x[None], y[None, 1:], temperature=1.0)[0]


def _liger_cross_entropy() -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x, y: -liger_cross_entropy(x, y, reduction="none")


def _quack() -> Callable:
    from quack.cross_entropy import cross_entropy

    return lambda x, y: -cross_entropy(x, y, reduction="none")


def _flash_attn() -> Callable:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x, y: -cross_entropy_loss(x, y)[0]


def gradient_of(function: Callable, upstream: torch.Tensor) -> Callable:
    """(logits, ...) -> the gradient of Σ upstream · function, all its outputs, in the logits."""

    def forward_and_backward(x, *others):
        x = x.detach().requires_grad_()
        out = function(x, *others)
        outputs = out if isinstance(out, tuple) else (out,)
        ups = [upstream[: len(each)].to(each.dtype) for each in outputs]
        return torch.autograd.grad(outputs, x, ups)

    return forward_and_backward
