"""The stage that learns from groups of answers: `grpo.py` as a fold."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import config as configuration
from rlhf_fn import optim, random, recipes
from rlhf_fn.config import ConfigError
from rlhf_fn.decoding import decoder
from rlhf_fn.grpo import Asked, Roles, equal_answers, grpo
from rlhf_fn.methods import Online
from rlhf_fn.models import Params
from rlhf_fn.precision import cast
from rlhf_fn.ranks import by_rows, model_by_rows
from rlhf_fn.rollout import Rollout, sample
from rlhf_fn.run import Run
from rlhf_fn.stages import batches, folded, prompt_batch
from rlhf_fn.steps import next_token_logprobs
from rlhf_fn.trainable import Trainable
from rlhf_fn.updates import begun, fused, precision, step_of


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
    actor, decode, dtype = tuned.model, decoder(policy), precision(options)
    updates = options.steps * method.epochs * method.minibatches
    warmup = min(options.warmup, updates - 1)
    schedule = optim.linear_schedule(options.lr, steps=updates, warmup=warmup)
    optimizer = fused(schedule, options)

    def draw(params: Params, *asked: Any, **more: Any) -> Rollout:
        return sample(
            decode, cast(tuned.whole(params), dtype), *asked, temperature=method.temperature,
            max_new_tokens=options.new_tokens, stop=stop, pad=pad, **more,
        )  # fmt: skip

    logprobs = next_token_logprobs(actor.apply, temperature=method.temperature)
    roles = Roles(
        model_by_rows(draw), model_by_rows(partial(draw, top_k=1)), model_by_rows(logprobs),
        cast(actor.params, precision(options)), by_rows(score),
    )  # fmt: skip

    rows = -(-options.batch * method.group // method.minibatches)
    time = max(map(len, prompts)) + options.new_tokens

    def ask(numbers: list[int]) -> Asked:
        return Asked(prompt_batch([prompts[i] for i in numbers], pad), torch.tensor(numbers))

    iteration = grpo(
        method, roles, batches(range(len(prompts)), options.batch, order_key, ask),
        step_of(method.loss(actor.apply), optimizer, options, rows=rows, time=time), pad=pad,
    )  # fmt: skip
    start = begun(actor.params, optimizer)
    return folded(options, iteration, start, fold_key, stage=stage, run=run).params
