"""TRL's trainers without their constructors, and the ragged rows that both sides are given.

A trainer here has the attributes that its loss reads and no more; its model returns the log-probs
of the rows, so that both sides are differentiated by the same leaf.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

PROMPT, TIME, ROWS = 3, 11, 8  # columns of prompt, columns and rows of answers
ALONE = SimpleNamespace(  # accelerate, in one process
    device=torch.device("cpu"),
    num_processes=1,
    is_main_process=True,
    sync_gradients=True,
    autocast=nullcontext,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, dim, pad_index: x,
)


class Rows(NamedTuple):
    """Answers: in a batch of pairs the first half is chosen and the second half rejected."""

    logprobs: Tensor  # [rows, time], a leaf
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor  # a leaf
    advantages: Tensor  # [rows]
    mask: Tensor


def ragged(seed: int, *, rows: int = ROWS, empty: bool = False, holes: bool = False) -> Rows:
    """Answers of one token, of all, and of between; `holes` hides some of their middle."""
    draw = torch.Generator().manual_seed(seed)
    random = torch.rand(5, rows, TIME, generator=draw)
    lengths = torch.randint(1, TIME + 1, (rows,), generator=draw)
    lengths[0], lengths[1], lengths[-1] = 1, TIME, 0 if empty else 2
    mask = torch.arange(TIME) < lengths[:, None]
    if holes:
        mask[:, 1:-1] &= random[4, :, 1:-1] > 0.3
    new, old, ref = -3 * random[:3]
    advantages = torch.randn(rows, generator=draw)
    return Rows(
        new.requires_grad_(), old, ref, random[3].clone().requires_grad_(), advantages, mask
    )


def trainer(kind: type, **attributes):
    """A trainer of TRL with these attributes; it evaluates, so that nothing is accumulated."""
    made = object.__new__(kind)
    common = {
        "model": SimpleNamespace(training=False, is_gradient_checkpointing=False),
        "accelerator": ALONE,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(report_to=[]),
    }
    for name, value in (common | attributes).items():
        setattr(made, name, value)
    return made


def scored(rows: Rows):
    """A model that says of these rows what TRL's fused head says: 0 where a label is ignored."""
    hidden = torch.zeros(len(rows.mask), PROMPT - 1)
    log_probs, entropy = (
        torch.cat([hidden, torch.where(rows.mask, x, 0.0)], 1)
        for x in (rows.logprobs, rows.entropy)
    )
    nothing = torch.zeros_like(log_probs)
    out = SimpleNamespace(
        log_probs=log_probs, entropy=entropy, mean_logits=nothing, is_top1=nothing.bool(),
        log_sum_sq_probs=-entropy.detach(),
    )  # fmt: skip
    return lambda **inputs: out


def tokens(rows: Rows) -> dict[str, Tensor]:
    """A batch of prompts and answers in one piece, as the preference trainers take it."""
    number = len(rows.mask)
    prompt = torch.zeros(number, PROMPT, dtype=torch.bool)
    mask = torch.cat([prompt, rows.mask], 1).long()
    return {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.cat([~prompt, rows.mask], 1).long(),
        "completion_mask": mask,
    }


def completions(rows: Rows, **more: Tensor) -> dict[str, Tensor]:
    """A batch of prompts and answers in two pieces, as the trainers that sample take it."""
    prompt = torch.ones(len(rows.mask), PROMPT, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(rows.mask, dtype=torch.long),
        "completion_mask": rows.mask.float(),
        "advantages": rows.advantages,
        "old_per_token_logps": rows.old_logprobs,
        "ref_per_token_logps": rows.ref_logprobs,
        "num_items_in_batch": rows.mask.sum(),
    } | more


def difference(theirs: Tensor, ours: Tensor, *leaves: Tensor) -> float:
    """The largest |Δ| of the values and of each gradient, as a share of their own largest."""
    settings = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    pairs = [(theirs, ours)]
    if leaves:
        both = (torch.autograd.grad(x.sum(), leaves, **settings) for x in (theirs, ours))
        pairs += list(zip(*both))
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-3)).item() for a, b in pairs)
