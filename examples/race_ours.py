"""Our side of benchmark_trl.py: a loss, an optimizer, and what each method asks of its models."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from race_setting import (
    ANSWER,
    BETAS,
    EOS,
    EPS,
    GROUP,
    KL,
    LR,
    MAX_NORM,
    PAD,
    PAIRS,
    PROMPT,
    PROMPTS,
    ROLLOUTS,
    SFT_LENGTH,
    SFT_ROWS,
    Job,
    Lap,
    llama,
    pairs,
    prompts,
    rows,
    worth,
)  # fmt: skip
from torch import Tensor

from rlhf_fn import data, groups, methods, random, recipes, weights
from rlhf_fn.decoding import decoder
from rlhf_fn.fused import fused_adamw
from rlhf_fn.grpo import Asked, grpo
from rlhf_fn.grpo import Roles as Asking
from rlhf_fn.heads import classifier, value_model
from rlhf_fn.losses import SftBatch, next_token_logprobs, sft_loss, value_loss
from rlhf_fn.models import Functional, causal_lm
from rlhf_fn.pair_losses import DpoBatch, answer_logprobs, reward_loss
from rlhf_fn.ppo import PpoState, Roles, ppo
from rlhf_fn.rollout import Rollout, sample
from rlhf_fn.stages import pair_batch, prompt_batch
from rlhf_fn.steps import Step, TrainState, donating_step, train_state

KEY = random.key(0)


def compiled(loss: Callable) -> Callable:
    return torch.compile(loss, fullgraph=True)


def stepping(loss: Callable, model: Functional) -> tuple[Step, TrainState]:
    optimizer = fused_adamw(
        LR, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=0.0, max_norm=MAX_NORM
    )
    return donating_step(compiled(loss), optimizer), train_state(model.params, optimizer)


def taken(step: Step, state: TrainState, batches: Iterator[Any]) -> Callable[[], float]:
    """A lap: the next batch, one step."""

    def lap() -> float:
        nonlocal state
        state, metrics = step(state, next(batches), KEY)
        return metrics["loss"].item()

    return lap


def parts(rows: list, size: int) -> Iterator[list]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def run_sft(job: Job) -> Callable[[], float]:
    model = causal_lm(llama("policy", job.vocab))
    step, state = stepping(sft_loss(model.apply), model)

    def batch(ids: list) -> SftBatch:
        tokens = torch.tensor(ids)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return SftBatch(tokens, real, weights.token_mean(real & (torch.arange(SFT_LENGTH) > 0)))

    every = rows(SFT_ROWS * 400, SFT_LENGTH, job.vocab, 0)
    return taken(step, state, map(batch, parts(every, SFT_ROWS)))


def run_dpo(job: Job) -> Callable[[], float]:
    model = causal_lm(llama("policy", job.vocab))
    method = recipes.dpo
    step, state = stepping(method.loss(model.apply), model)
    reference, of = {n: p.clone() for n, p in model.params.items()}, None
    of = compiled(answer_logprobs(model.apply))

    def batch(rows: list) -> DpoBatch:
        tokens = torch.tensor([[p + c, p + r] for p, c, r in rows])
        real = torch.ones_like(tokens, dtype=torch.bool)
        mask = real & (torch.arange(PROMPT + ANSWER) >= PROMPT)
        empty = torch.zeros(tokens.shape)
        asked = DpoBatch(tokens, real, mask, empty, torch.full((PAIRS,), 1 / PAIRS))
        with torch.no_grad():
            return asked._replace(ref_logprobs=of(reference, asked))

    every = list(zip(*pairs(job.vocab, PROMPT, ANSWER)))
    return taken(step, state, map(batch, parts(every, PAIRS)))


def run_reward(job: Job) -> Callable[[], float]:
    model = classifier(llama("reward", job.vocab))
    step, state = stepping(reward_loss(model.apply), model)
    _, *sides = pairs(job.vocab, 1, PROMPT + ANSWER)
    examples = [[data.Example(row, [True] * len(row)) for row in side] for side in sides]
    made = partial(pair_batch, pad=PAD)
    return taken(step, state, map(made, parts(list(zip(*examples)), PAIRS)))


def run_grpo(job: Job) -> Callable[[], float]:
    module = llama("policy", job.vocab)
    model = causal_lm(module)
    method = recipes.grpo._replace(  # what TRL's defaults are
        group=GROUP, kl_coef=0.0, weights=weights.token_mean,
        advantages=partial(
            methods.of_scores, advantages=partial(groups.grpo_advantages, ddof=1, eps=1e-4)
        ),
    )  # fmt: skip
    step, state = stepping(method.loss(model.apply), model)
    draw = partial(
        sample, decoder(module), max_new_tokens=ANSWER, temperature=1.0, stop=(EOS,), pad=PAD
    )
    logprobs = compiled(next_token_logprobs(model.apply))
    roles = Asking(draw, draw, logprobs, model.params, lambda rollout, _: paid(rollout))
    every = prompts(PROMPTS, job.vocab)

    def asked(number: int) -> Asked:
        mine = every[number * PROMPTS : (number + 1) * PROMPTS]
        return Asked(prompt_batch(mine, PAD), torch.arange(PROMPTS))

    iteration, number = grpo(method, roles, asked, step, pad=PAD), 0

    def lap() -> float:
        nonlocal state, number
        state, metrics = iteration(state, random.fold_in(KEY, number), number)
        number += 1
        return metrics["loss"].item()

    return lap


def paid(rollout: Rollout) -> Tensor:
    return torch.tensor([worth(row[keep].tolist()) for row, keep in zip(*rollout[0::2][:2])])


def run_ppo(job: Job) -> Callable[[], float]:
    module = llama("policy", job.vocab)
    actor = causal_lm(module)
    scores = classifier(llama("reward", job.vocab))
    value_module = llama("value", job.vocab)
    critic = value_model(value_module, random.key(1))
    critic = critic._replace(params=classifier(value_module).params)
    method = recipes.ppo._replace(kl_reward=KL, minibatches=1)
    actor_step, actor_state = stepping(method.loss(actor.apply), actor)
    critic_step, critic_state = stepping(value_loss(critic.apply, clip=0.2), critic)
    draw = partial(
        sample, decoder(module), max_new_tokens=ANSWER, temperature=1.0, stop=(EOS,), pad=PAD
    )
    frozen = {name: p.clone() for name, p in actor.params.items()}
    score = compiled(scores.apply)
    roles = Roles(
        draw, compiled(next_token_logprobs(actor.apply)), compiled(critic.apply), frozen,
        lambda rollout: score(scores.params, rollout.tokens, rollout.attention),
    )  # fmt: skip
    every = prompts(ROLLOUTS, job.vocab)
    iteration = ppo(
        method, roles, lambda n: prompt_batch(every[n * ROLLOUTS : (n + 1) * ROLLOUTS], PAD),
        actor_step, critic_step,
    )  # fmt: skip
    state, number = PpoState(actor_state, critic_state, torch.tensor(KL)), 0

    def lap() -> float:
        nonlocal state, number
        state, metrics = iteration(state, random.fold_in(KEY, number), number)
        number += 1
        return metrics["loss"].item()

    return lap


JOBS = {"sft": run_sft, "dpo": run_dpo, "reward": run_reward, "grpo": run_grpo, "ppo": run_ppo}


def main() -> None:
    """python race_ours.py NAME VOCAB DTYPE"""
    name, vocab, dtype = sys.argv[1:]
    Lap().run(JOBS[name](Job(name, int(vocab), dtype)))


if __name__ == "__main__":
    main()
