"""Five runs of a recipe at once: the five steps are one `vmap(step)`.

    python examples/five_seeds.py --model MODEL --prompts STORIES --recipes grpo dr_grpo dapo

A story goes on with a sentence, and the reward is 1 where that says "happy" and ends within 24
tokens. Prints the success rate on held-out prompts, before and after, of five seeds. Each seed has
its own parameters, samples and optimizer.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from rewards import happy
from torch import Tensor, vmap

from rlhf_fn import data, optim, random, readers, tree
from rlhf_fn.collate import prompt_batch
from rlhf_fn.decoding import decoder
from rlhf_fn.grpo import Asked, Roles, policy_batch, samples_of
from rlhf_fn.loading import load_policy, stopping
from rlhf_fn.methods import Online
from rlhf_fn.models import causal_lm
from rlhf_fn.online import recipe
from rlhf_fn.reward_functions import scorer
from rlhf_fn.rollout import sample
from rlhf_fn.steps import gradient_step, next_token_logprobs, train_state
from rlhf_fn.updates import adamw

SEEDS, PROMPT, ANSWER = 5, 12, 24  # prompts and answers in tokens
STUDENT = 2.776  # 95 % of Student's t with four degrees of freedom lie within ± this


class Task:
    """Prompts, a policy and its reward, as the functions that a method asks for."""

    def __init__(self, model: str, prompts: str, method: Online):
        self.policy = stopping(load_policy(model), (".",))
        encode = self.policy.encoder
        texts = readers.read_prompts(prompts).records
        rows = [tuple(data.encode_prompt(encode, text)[:PROMPT]) for text in texts]
        rows = [list(row) for row in dict.fromkeys(rows) if len(row) == PROMPT]
        self.train, self.test = data.split(rows, random.key(0), 0.25)
        self.model = causal_lm(self.policy.module)
        draw = partial(
            sample, decoder(self.policy.module), max_new_tokens=ANSWER,
            temperature=method.temperature, stop=self.policy.stop, pad=encode.pad,
        )  # fmt: skip
        records = [{"prompt": self.policy.tokenizer.decode(row)} for row in rows]
        score = scorer(happy, self.policy.tokenizer, records, torch.tensor(self.policy.stop))
        logprobs = next_token_logprobs(self.model.apply, temperature=method.temperature)
        self.roles = Roles(draw, partial(draw, top_k=1), logprobs, self.model.params, score)

    def asked(self, key: Tensor, number: int, batch: int) -> Asked:
        numbers = data.batch_indices(key, number, rows=len(self.train), batch=batch)
        rows = [self.train[i] for i in numbers.tolist()]
        return Asked(prompt_batch(rows, self.policy.encoder.pad), numbers)

    @torch.no_grad()
    def success(self, params: dict[str, Tensor], key: Tensor) -> float:
        """The share of rewarded answers to four times the held-out prompts."""
        prompts = prompt_batch(self.test * 4, self.policy.encoder.pad)
        keys = random.split(key, len(prompts.tokens))
        rollout = self.roles.sample(params, prompts, keys)
        numbers = torch.zeros(len(keys), dtype=torch.int64)
        return self.roles.score(rollout, numbers).mean().item()  # it reads no record


def train(task: Task, method: Online, *, steps: int, batch: int, lr: float) -> list[float]:
    """The success rates after training, one per seed."""
    updates = steps * method.epochs * method.minibatches
    optimizer = adamw(optim.linear_schedule(lr, steps=updates, warmup=4), max_norm=1.0)
    step = vmap(gradient_step(method.loss(task.model.apply), optimizer))
    seeds = random.split(random.key(0), SEEDS)
    states = stacked([train_state(task.model.params, optimizer)] * SEEDS)
    for number in range(steps):
        keys = torch.stack([random.fold_in(seed, number) for seed in seeds])
        drawn = [
            minibatches(task, method, one(states.params, i), keys[i], number, batch)
            for i in range(SEEDS)
        ]
        for parts in zip(*drawn):
            states, _ = step(states, stacked(parts), keys)
    return [task.success(one(states.params, i), seeds[i]) for i in range(SEEDS)]


@torch.no_grad()
def minibatches(task: Task, method: Online, params, key: Tensor, number: int, batch: int):
    """What one seed learns from in this iteration; prompts that are not kept weigh nothing."""
    order_key, sample_key, cut_key = random.split(key, 3)
    asked = task.asked(order_key, number, batch)
    samples, _ = samples_of(method, task.roles, params, asked, sample_key)
    advantages = method.advantages(samples)
    samples = samples._replace(mask=samples.mask & method.keep(samples.scores)[:, None, None])
    for epoch_key in random.split(cut_key, method.epochs):
        for rows in random.permutation(epoch_key, batch).chunk(method.minibatches):
            part = tree.map(lambda x, rows=rows: x[rows], samples)
            yield policy_batch(part, advantages[rows], method.weights)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of one shape as one tree, with the seed as the first axis."""
    return tree.map(lambda *x: torch.stack(x), *trees)


def one(trees: Any, i: int) -> Any:
    """The i-th of stacked trees."""
    return tree.map(lambda x: x[i], trees)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", required=True)
    options.add_argument("--prompts", required=True)
    options.add_argument("--recipes", nargs="+", default=["grpo"])
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--lr", type=float, default=1e-3)
    given = options.parse_args()
    print("| recipe | before | after, five seeds | mean, 95 % interval | seconds |")
    print("|---|---|---|---|---|")
    for name in given.recipes:
        method = recipe(name, Online)._replace(group=8, epochs=1, minibatches=2)
        task, began = Task(given.model, given.prompts, method), time.perf_counter()
        before = task.success(task.model.params, random.key(0))
        after = train(task, method, steps=given.steps, batch=given.batch, lr=given.lr)
        half = STUDENT * stdev(after) / SEEDS**0.5
        rates = " ".join(f"{rate:.3f}" for rate in after)
        low, high = max(mean(after) - half, 0), min(mean(after) + half, 1)
        row = f"{before:.3f} | {rates} | {mean(after):.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {name} | {row} | {time.perf_counter() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
