"""A whole step of GRPO with half a billion parameters: a rollout, and what is learned from it.

Ours samples by compiled turns and learns without logits, by a compiled gradient and in place. TRL's
trainer, where it is installed, has the same model, prompts, reward and optimizer.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import bench
import rlhf_kernels
import torch
import train
from bench import Job, Machine, Row
from llamas import HALF_BILLION, Shape, llama

COLUMNS = ("who", "ms", "quartiles", "new tokens/s", "extra MB")
PAD, EOS = 0, 1
LAPS = 5  # of TRL, the first of which does not count


class Size(NamedTuple):
    shape: Shape = HALF_BILLION
    prompts: int = 8
    group: int = 8
    prompt: int = 64
    new: int = 64

    @property
    def answers(self) -> int:
        return self.prompts * self.group


shown = partial(bench.told, columns=COLUMNS)


def jobs(machine: Machine, *, size: Size | None = None, seconds: float = 12.0) -> Iterator[Job]:
    """First everything is compiled, on two prompts; then ours, then TRL's."""
    size, made = size or Size(), []
    yield "compiling", partial(begin, made, machine, size)
    yield "ours", partial(ours, made, machine, size, seconds)
    yield "TRL", partial(of_trl, machine, size)


def begin(made: list, machine: Machine, size: Size) -> list[Row]:
    """The model and its graphs."""
    bench.compiled_anew()
    made.append(learner(machine, size))
    lap, _ = lapped(made[0], machine, size._replace(prompts=2))
    lap(0)
    return []


def ours(made: list, machine: Machine, size: Size, seconds: float) -> list[Row]:
    """A step, and the rollout in it alone."""
    lap, draw = lapped(made[0], machine, size)
    times = bench.race(
        {"ours": lap, "its rollout": draw}, machine, rounds=10, least=3, seconds=seconds, warm=1
    )
    rows = []
    for who, taken in times.items():
        if isinstance(taken, str):
            rows.append({"who": who, "status": "FAILED", "why": f"{who}: {taken}"})
            continue
        rows.append({
            "who": who, "ms": taken.median * 1e3,
            "quartiles": f"{taken.low * 1e3:.4g}–{taken.high * 1e3:.4g}",
            "new tokens/s": size.answers * size.new / taken.median, "extra MB": taken.peak / 1e6,
        })  # fmt: skip
    return rows


class Learner(NamedTuple):
    """What serves any number of prompts: a method, its step and its sampler."""

    method: Any
    params: dict[str, torch.Tensor]
    step: Callable
    optimizer: Any
    sample: Callable  # (params, prompts, keys) -> Rollout


def learner(machine: Machine, size: Size) -> Learner:
    """The graphs are made by their first calls."""
    from rlhf_fn import recipes, weights
    from rlhf_fn.compiled import compiled_gradient
    from rlhf_fn.decoding import decoder
    from rlhf_fn.engine import compiled, one_graph
    from rlhf_fn.fused import fused_adamw
    from rlhf_fn.precision import cast, in_dtype
    from rlhf_fn.projection import of_projection, projected_lm
    from rlhf_fn.rollout import sample
    from rlhf_fn.steps import donating_step, of_asked, of_shared

    module = llama(machine, size.shape, size.prompt + size.new)
    turns = compiled(decoder(module), partial(one_graph, backend=machine.backend))
    method = recipes.grpo._replace(group=size.group, kl_coef=0.0, weights=weights.token_mean)
    model = in_dtype(projected_lm(module), torch.bfloat16)
    kernel = of_projection(rlhf_kernels.linear_token_logprobs_and_entropy)
    optimizer = fused_adamw(train.RATE, **train.ADAM, max_norm=train.MAX_NORM)
    gradient = partial(
        compiled_gradient, rows=2, time=size.prompt + size.new, backend=machine.backend
    )
    loss = method.loss(model.apply, token_logprobs=kernel)

    def draw(params: Any, *asked: Any) -> Any:
        return sample(
            turns, cast(params, torch.bfloat16), *asked, max_new_tokens=size.new, temperature=1.0,
            stop=(EOS,), pad=PAD,
        )  # fmt: skip

    step = donating_step(loss, optimizer, gradient=of_asked(of_shared(gradient)))
    return Learner(method, model.params, step, optimizer, draw)


def lapped(learner: Learner, machine: Machine, size: Size) -> tuple[Callable, Callable]:
    """(a step of GRPO, its rollout), each of the number of a round."""
    from rlhf_fn.grpo import Asked, Roles, grpo
    from rlhf_fn.models import frozen
    from rlhf_fn.random import fold_in, key, split
    from rlhf_fn.rollout import Prompts
    from rlhf_fn.steps import train_state

    device, once = machine.device, key(0, device=machine.device)
    tokens = torch.randint(3, size.shape.vocab, (size.prompts, size.prompt), device=device)
    prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    asked = Asked(prompts, torch.arange(size.prompts, device=device))

    def unasked(*_: Any) -> Any:
        raise RuntimeError("this method has no reference")

    roles = Roles(learner.sample, unasked, unasked, {}, lambda rollout, _: even(rollout))
    iteration = grpo(learner.method, roles, lambda _: asked, learner.step, pad=PAD)
    state = train_state(frozen(learner.params), learner.optimizer)

    def lap(number: int) -> None:
        nonlocal state
        state, _ = iteration(state, fold_in(once, number), number)

    def draw(number: int) -> Any:
        return learner.sample(state.params, prompts, split(fold_in(once, number), size.answers))

    return lap, draw


def even(rollout: Any) -> torch.Tensor:
    """The reward: the share of an answer's tokens that are even."""
    hits = (rollout.tokens % 2 == 0) & rollout.mask
    return hits.sum(-1) / rollout.mask.sum(-1)


def of_trl(machine: Machine, size: Size) -> list[Row]:
    """From one of its callbacks to the next."""
    sys.path.append(str(bench.ROOT / "examples"))
    try:
        from datasets import Dataset
        from race_trl import texts, tokenizer
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise bench.Skipped(bench.said(error)) from error
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if machine.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    def paid(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]

    asked = torch.randint(3, size.shape.vocab, (LAPS * size.prompts, size.prompt)).tolist()
    module = llama(machine, size.shape, size.prompt + size.new)
    module.config.update({"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None})
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=machine.device == "cpu",
        per_device_train_batch_size=size.answers, num_generations=size.group,
        max_completion_length=size.new, temperature=1.0, top_k=0, top_p=1.0, max_steps=LAPS,
        learning_rate=train.RATE, lr_scheduler_type="constant", adam_beta1=train.ADAM["b1"],
        adam_beta2=train.ADAM["b2"], weight_decay=train.ADAM["weight_decay"],
        max_grad_norm=train.MAX_NORM, optim="adamw_torch_fused", gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        module, reward_funcs=paid, args=args, processing_class=tokenizer(size.shape.vocab),
        train_dataset=Dataset.from_dict({"prompt": texts(asked)}), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    taken = [end - begin for begin, end in zip(ends, ends[1:])]
    middle = statistics.median(taken)
    speed = size.answers * size.new / middle
    return [{"who": "TRL", "ms": middle * 1e3, "new tokens/s": speed}]
