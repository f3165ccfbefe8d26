"""`rlhf-fn grpo`: a policy learns from groups of its own answers, scored by a reward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fn import collate, data, random, readers
from rlhf_fn import config as configuration
from rlhf_fn.config import ConfigError
from rlhf_fn.frame import finish, read, split
from rlhf_fn.judge import duel
from rlhf_fn.loading import (
    Policy,
    check_length,
    load_policy,
    load_scores,
    stopping,
    without_weights,
)
from rlhf_fn.online import learn, method_of
from rlhf_fn.ranks import by_rows
from rlhf_fn.reading import reading
from rlhf_fn.reward_functions import reward_function, scorer
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import opened
from rlhf_fn.sampler import sampling
from rlhf_fn.trainable import save_trained, trainable
from rlhf_fn.updates import computing, device, precision, resident

Record = dict[str, Any]
Score = Callable[[Rollout, Tensor], Tensor]


def grpo(options: configuration.Grpo, *, resume: bool) -> None:
    """Tune a policy by a recipe of `recipes.py`; scores on held-out prompts before and after."""
    method = method_of(options)
    policy = load_policy(options.model, device(options), sliced=options.shards > 1)
    policy = stopping(policy, options.stop)
    split_key, stage_key, judge_key, lora_key = random.split(random.key(options.seed), 4)
    prompts = distinct_prompts(options, policy)
    kept, held = split(list(prompts), split_key, options.held_out, "distinct --prompts")
    check_length(policy.module, kept + held, options.new_tokens, "--new-tokens")
    score = _score(options, policy)
    train, test = (score([prompts[tuple(row)] for row in rows]) for rows in (kept, held))
    make = reading(options).make
    tuned = trainable(
        policy.module, computing(make(policy.module), options), options.lora, lora_key, make=make,
        dtype=precision(options), keep=partial(resident, options=options),
    )  # fmt: skip
    policy = without_weights(policy)
    with opened(options, resume=resume) as run:
        params = learn(
            options, method, policy.module, tuned, train, kept, run=run, key=stage_key,
            pad=policy.encoder.pad, stop=policy.stop,
        )  # fmt: skip
        verdict = duel(
            sampling(policy.module, options), tuned.merged(params, torch.float32), tuned.start,
            collate.prompt_batches(held[:256], policy.encoder.pad),
            lambda rollout, numbers: by_rows(test)(rollout, torch.tensor(numbers)).tolist(),
            policy.tokenizer, judge_key, new_tokens=options.new_tokens,
            temperature=method.temperature, stop=policy.stop, pad=policy.encoder.pad,
        )  # fmt: skip
        save_trained(run.directory, policy, tuned, params)
        title = f"{options.recipe}, judged by its own reward on unseen prompts"
        finish(run, title, verdict.results, verdict.samples[:16])


def distinct_prompts(options: configuration.Grpo, policy: Policy) -> dict[tuple[int, ...], Record]:
    """The record of every prompt, by its tokens; of equal prompts the first."""
    found: dict[tuple[int, ...], Record] = {}
    records = read(options.prompts, lambda p: readers.read_prompt_records(p, field=options.field))
    for record in records:
        every = data.encode_prompt(policy.encoder, record["prompt"])
        tokens = every[: options.prompt_tokens or None]
        cut = len(tokens) < len(every)
        said = (
            policy.tokenizer.decode(tokens, skip_special_tokens=True) if cut else record["prompt"]
        )
        found.setdefault(tuple(tokens), record | {"prompt": said})
    return found


def _score(options: configuration.Grpo, policy: Policy) -> Callable[[list[Record]], Score]:
    """A reward function of the records, or a reward model, which has no need of them."""
    name = options.reward
    if ":" in name:
        function = reward_function(name)
        return lambda records: scorer(
            function, policy.tokenizer, records, torch.tensor(policy.stop)
        )
    try:
        scores = load_scores(name, policy.tokenizer, device(options)).scores
    except OSError as error:
        raise ConfigError(
            f"--reward {name} is neither module:function nor the folder of a reward model ({error})"
        ) from error
    return lambda records: (
        lambda rollout, _: scores.apply(scores.params, rollout.tokens, rollout.attention)
    )
