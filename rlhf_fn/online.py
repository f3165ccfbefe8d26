"""The stage that learns from groups of answers: `grpo.py` as a fold."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import config as configuration
from rlhf_fn import optim, random, recipes
from rlhf_fn.collate import batches, prompt_batch
from rlhf_fn.config import ConfigError
from rlhf_fn.fused import InPlace
from rlhf_fn.grpo import Asked, Roles, equal_answers, grpo
from rlhf_fn.methods import Online
from rlhf_fn.models import Params
from rlhf_fn.precision import cast
from rlhf_fn.ranks import by_rows
from rlhf_fn.reading import reading
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import Run
from rlhf_fn.sampler import sampler
from rlhf_fn.sharding import model_by_rows
from rlhf_fn.stages import folded
from rlhf_fn.trainable import Trainable
from rlhf_fn.updates import begun, fused, precision, readable, step_of


def recipe(name: str, kind: type) -> Any:
    """The method of that kind and name in `recipes.py`.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    known = {n: x for n, x in vars(recipes).items() if isinstance(x, kind) and n[0] != "_"}
    if name not in known:
        raise ConfigError(f"--recipe is {name!r}; it must be one of {', '.join(known)}")
    return known[name]


def method_of(options: configuration.Grpo) -> Online:
    """The recipe, with what the options change of it.

    Raises:
        ConfigError: an unknown recipe, or a group too small for its baseline.
    """
    chosen = recipe(options.recipe, Online)
    given = {name: getattr(options, name) for name in ("group", "epochs", "minibatches")}
    method = chosen._replace(**{name: value for name, value in given.items() if value})
    try:
        method.advantages(equal_answers(method.group))
    except ValueError as error:
        raise ConfigError(
            f"--group {method.group} does not suit {options.recipe}: {error}"
        ) from error
    return method


def learn(
    options: configuration.Grpo,
    method: Online,
    policy: Any,
    tuned: Trainable,
    score: Callable[[Rollout, Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    run: Run,
    key: Tensor,
    pad: int,
    stop: Sequence[int],
    stage: str = "grpo",
) -> Params:
    """`method` from `policy` (also the frozen reference) against `score`; what is trained of it.

    Args:
        policy: a causal LM module.
        tuned: what of it is trained.
        score: (rollout, numbers of its prompts) -> one reward per row.
        prompts: token ids, one list per prompt.
    """
    order_key, fold_key = random.split(key)
    actor = tuned.model
    optimizer = _optimizer(options, options.steps * method.epochs * method.minibatches)

    width = max(map(len, prompts))
    drawn = partial(
        sampler, policy, options, tuned.start, merged=tuned.merged, width=width,
        temperature=method.temperature, stop=stop, pad=pad,
    )  # fmt: skip
    draw = drawn(group=method.group)
    read = reading(options)
    answers = read.answers(actor.apply, method, options.new_tokens)
    logprobs = model_by_rows(answers, partial(readable, options=options))
    roles = Roles(
        draw, drawn(top_k=1) if method.greedy else draw, logprobs,
        cast(actor.params, precision(options)), by_rows(score),
    )  # fmt: skip
    rows = -(-options.batch * method.group // method.minibatches)

    def ask(numbers: list[int]) -> Asked:
        return Asked(prompt_batch([prompts[i] for i in numbers], pad), torch.tensor(numbers))

    loss = method.loss(actor.apply, token_logprobs=read.entropies)
    step = step_of(loss, optimizer, options, rows=rows, time=width + options.new_tokens, share=True)
    asked = batches(range(len(prompts)), options.batch, order_key, ask)
    iteration = grpo(method, roles, asked, step, pad=pad)
    start = begun(actor.params, optimizer)
    return folded(options, iteration, start, fold_key, stage=stage, run=run).params


def _optimizer(options: configuration.Grpo, updates: int) -> InPlace:
    warmup = min(options.warmup, updates - 1)
    return fused(optim.linear_schedule(options.lr, steps=updates, warmup=warmup), options)
