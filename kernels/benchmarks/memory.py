"""`python kernels/benchmarks/memory.py`: how much of a GRPO step fits, with logits and without.

A step of a model of the shape of Qwen2.5-0.5B, AdamW included, in float32, all activations kept, is
run on fake tensors, which have sizes and no numbers: each storage is counted from birth to death.
How good the count is, a small model tells, whose step is counted and measured. It is linear in the
batch once the batch is large: two counts give the largest one of each budget, which is counted too.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

LENGTHS = (1024, 4096)
BUDGETS = (24, 48, 80)  # GB
MANY = 32768  # tokens of a step whose peak is in the loss, and not in the optimizer
WORKSPACE = 2**28  # bytes that `rlhf_kernels.linear_token_logprobs` allows itself, unseen from here
COLUMNS = ("length", "way", "MB/row", *(f"rows in {b} GB" for b in BUDGETS))
ALLOWED = 0.05  # of the measured peak


class Size(NamedTuple):
    vocab: int = 151936
    width: int = 896
    inner: int = 4864
    layers: int = 24
    heads: int = 14
    groups: int = 2


LARGE = Size()
SMALL = Size(vocab=8192, width=64, inner=256, layers=2, heads=4, groups=2)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def ways() -> dict[str, tuple[bool, Callable]]:
    """name -> (whether there are logits, what the loss reads log π and H with)."""
    import rlhf_fn
    from rlhf_fn.projection import of_projection

    return {
        "logits, floor 0": (True, rlhf_fn.token_logprobs),
        "logits, kernel": (True, rlhf_kernels.token_logprobs_and_entropy),
        "no logits, floor 0": (False, of_projection(rlhf_fn.linear_token_logprobs_and_entropy)),
        "no logits, kernel": (
            False,
            of_projection(rlhf_kernels.linear_token_logprobs_and_entropy),
        ),
    }


def stepped(size: Size, way: str, rows: int, length: int) -> tuple[Callable, int]:
    """(a step, the bytes of the state and the batch that it is given)."""
    import transformers as hf

    from rlhf_fn.kl import k2
    from rlhf_fn.losses import PolicyBatch, of_tokens, policy_loss
    from rlhf_fn.models import causal_lm
    from rlhf_fn.optim import adamw
    from rlhf_fn.policy import clipped_surrogate
    from rlhf_fn.projection import projected_lm
    from rlhf_fn.random import key
    from rlhf_fn.steps import autograd_gradient, gradient_step, train_state

    logits, token_logprobs = ways()[way]
    config = hf.Qwen2Config(
        vocab_size=size.vocab, hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.groups, max_position_embeddings=length, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        module = hf.Qwen2ForCausalLM(config)
    module.model.rotary_emb = type(module.model.rotary_emb)(config)  # its frequencies are constants
    apply, params = (causal_lm if logits else projected_lm)(module)
    params = {name: torch.zeros(p.shape) for name, p in params.items()}
    loss = policy_loss(
        apply, surrogate=of_tokens(clipped_surrogate, clip_low=0.2, clip_high=0.2), penalty=k2,
        temperature=1.0, kl_coef=0.05, entropy_coef=0.0,
        token_logprobs=token_logprobs,
    )  # fmt: skip
    optimizer = adamw(1e-6, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    step = gradient_step(loss, optimizer, gradient=autograd_gradient)
    shape = rows, length
    floats = [torch.zeros(shape) for _ in range(4)]
    batch = PolicyBatch(
        torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool), *floats
    )
    state, once = train_state(params, optimizer), key(0)
    given = sum(x.nbytes for x in _tensors((state, batch)))
    return lambda: step(state, batch, once), given


def counted(size: Size, way: str, rows: int, length: int) -> int:
    """Bytes at the peak of a step, and what it is given, without doing it."""
    from rlhf_fn.room import Held

    with FakeTensorMode(allow_non_fake_inputs=True):
        step, given = stepped(size, way, rows, length)
        gc.collect()
        with Held() as held:
            step()
    return given + held.peak


def checked(size: Size, way: str, rows: int, length: int) -> list[Row]:
    """The count beside what the allocator saw, of a step that is done."""
    step, given = stepped(size, way, rows, length)
    measured = bench.cpu().peak(step) + given
    count = counted(size, way, rows, length)
    row = {"checked": way, "counted MB": count / 1e6, "measured MB": measured / 1e6}
    if abs(count / measured - 1) > ALLOWED and "kernel" not in way:
        row |= {"status": "FAILED", "why": f"{way}: counted {count}, measured {measured}"}
    return [row]


def fitted(
    size: Size, way: str, length: int, budgets: Sequence[float], tokens: int = MANY
) -> list[Row]:
    """The most rows in each budget: on the line through two large counts, then counted."""
    unseen = WORKSPACE if way == "no logits, kernel" else 0

    def peak(rows: int) -> int:
        return counted(size, way, rows, length) + unseen

    many = max(tokens // length, 1)
    first, second = peak(many), peak(2 * many)
    slope = (second - first) / many
    most = [max(int(many + (budget * 1e9 - first) // slope), 0) for budget in budgets]
    row = {"length": length, "way": way, "MB/row": slope / 1e6}
    row |= {f"rows in {budget} GB": rows for budget, rows in zip(budgets, most)}
    for rows, budget in zip(most, budgets):
        if rows and peak(rows) > budget * 1e9:  # the optimizer's own peak is no part of the line
            row |= {"status": "FAILED", "why": f"{way}: {rows} rows are more than {budget} GB"}
    return [row]


def jobs(
    machine: Machine | None = None, *, size: Size = LARGE, small: Size = SMALL,
    lengths: Sequence[int] = LENGTHS, budgets: Sequence[int] = BUDGETS,
) -> Iterator[Job]:  # fmt: skip
    """The check of the count, then the table."""
    del machine
    for way in ways():
        yield f"check {way}", partial(checked, small, way, 4, 128)
    for length in lengths:
        for way in ways():
            yield f"{way}, {length}", partial(fitted, size, way, length, budgets)


def shown(rows: Sequence[Row]) -> str:
    """Both tables."""
    tables = (("checked", "counted MB", "measured MB"), COLUMNS)
    return "\n\n".join(bench.told(rows, columns) for columns in tables)


def main() -> None:
    """The tables, in a few minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = bench.run(jobs(), 3600, lambda rows: asked.json and bench.write(asked.json, rows))
    print(shown(rows))
    raise SystemExit(1 if bench.failed(rows) else 0)


if __name__ == "__main__":
    main()
