"""Our side of benchmark_trl.py: a loss, an optimizer, and what each method asks of its models."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
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

from rlhf_fn import data, engine, groups, methods, random, recipes, weights
from rlhf_fn.batches import asked
from rlhf_fn.collate import pair_batch, prompt_batch
from rlhf_fn.compiled import compiled_gradient
from rlhf_fn.decoding import decoder
from rlhf_fn.fused import fused_adamw
from rlhf_fn.grpo import Asked, grpo
from rlhf_fn.grpo import Roles as Asking
from rlhf_fn.heads import classifier, value_model
from rlhf_fn.losses import SftBatch, next_token_logprobs, sft_loss, value_loss
from rlhf_fn.models import Functional, frozen
from rlhf_fn.pair_losses import DpoBatch, answer_logprobs, reward_loss
from rlhf_fn.ppo import PpoState, Roles, ppo
from rlhf_fn.precision import cast, in_dtype
from rlhf_fn.prefix import shared, with_prefix
from rlhf_fn.reading import Reading, reading
from rlhf_fn.rollout import Rollout, completions, sample
from rlhf_fn.steps import Step, TrainState, donating_step, of_asked, of_shared, train_state

KEY = random.key(0)
LARGE = 4096  # a vocabulary whose logits are worth doing without


def read_by(job: Job) -> Reading:
    """Without logits where they are large."""
    kernels = "rlhf_kernels" if job.vocab > LARGE else ""
    return reading(SimpleNamespace(kernels=kernels, recompute=0, shards=1))


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def stepping(
    loss: Callable, model: Functional, rows: int, time: int = PROMPT + ANSWER
) -> tuple[Step, TrainState]:
    """AdamW on a compiled loss of batches of that size, over a state of its own."""
    optimizer = fused_adamw(
        LR, b1=BETAS[0], b2=BETAS[1], eps=EPS, weight_decay=0.0, max_norm=MAX_NORM
    )
    gradient = of_asked(of_shared(partial(compiled_gradient, rows=rows, time=time)))
    state = train_state(frozen(model.params), optimizer)
    return donating_step(loss, optimizer, gradient=gradient), state


def computing(model: Functional, job: Job) -> Functional:
    """In the dtype of the job; scores and values come out in float32."""
    dtype = getattr(torch, job.dtype)
    return model if dtype == torch.float32 else in_dtype(model, dtype, out=torch.float32)


def policy(job: Job) -> tuple[Functional, Callable[..., Rollout]]:
    """The policy, and how it is sampled."""
    module, dtype = llama("policy", job.vocab), getattr(torch, job.dtype)
    turns = engine.compiled(decoder(module))

    def draw(params: dict[str, Tensor], *asked: Any) -> Rollout:
        return sample(
            turns, cast(params, dtype), *asked, max_new_tokens=ANSWER, temperature=1.0,
            stop=(EOS,), pad=PAD,
        )  # fmt: skip

    model = read_by(job).make(module)
    return model if dtype == torch.float32 else in_dtype(model, dtype), draw


def answered(model: Functional, job: Job) -> Callable[..., Tensor]:
    """The log-probs of what follows the prompts."""
    read = read_by(job).logprobs
    of = compiled(next_token_logprobs(model.apply, last=ANSWER, token_logprobs=read))
    return lambda params, *rows: of(params, *with_prefix(*rows, ANSWER))


def taken(step: Step, state: TrainState, batches: Iterator[Any]) -> Callable[[], float]:
    """A lap: the next batch, one step."""

    def lap() -> float:
        nonlocal state
        state, metrics = step(state, next(batches), KEY)
        return metrics["loss"].item()

    return lap


def iterated(iteration: Callable, state: Any) -> Callable[[], float]:
    """A lap: a rollout and what is learned from it."""
    number = 0

    def lap() -> float:
        nonlocal state, number
        state, metrics = iteration(state, random.fold_in(KEY, number), number)
        number += 1
        return metrics["loss"].item()

    return lap


def parts(rows: list, size: int) -> Iterator[list]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def of_sft(job: Job) -> Callable[[], float]:
    model, _ = policy(job)
    step, state = stepping(
        sft_loss(model.apply, token_logprobs=read_by(job).hits), model, SFT_ROWS, SFT_LENGTH
    )

    def batch(ids: list) -> SftBatch:
        tokens = torch.tensor(ids)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return SftBatch(tokens, real, weights.token_mean(real & (torch.arange(SFT_LENGTH) > 0)))

    every = rows(SFT_ROWS * 400, SFT_LENGTH, job.vocab, 0)
    return taken(step, state, map(batch, parts(every, SFT_ROWS)))


def of_dpo(job: Job) -> Callable[[], float]:
    model, _ = policy(job)
    step, state = stepping(
        recipes.dpo.loss(model.apply, token_logprobs=read_by(job).logprobs), model, PAIRS
    )
    of = compiled(answer_logprobs(model.apply, token_logprobs=read_by(job).logprobs))

    def batch(rows: list) -> DpoBatch:
        tokens = torch.tensor([[p + c, p + r] for p, c, r in rows])
        real = torch.ones_like(tokens, dtype=torch.bool)
        mask = real & (torch.arange(PROMPT + ANSWER) >= PROMPT)
        empty = torch.zeros(tokens.shape)
        batch = DpoBatch(tokens, real, mask, empty, torch.full((PAIRS,), 1 / PAIRS))
        with torch.no_grad():
            batch = asked(batch)
            return batch._replace(ref_logprobs=of(model.params, shared(batch)))

    every = list(zip(*pairs(job.vocab)))
    return taken(step, state, map(batch, parts(every, PAIRS)))


def of_reward(job: Job) -> Callable[[], float]:
    model = computing(classifier(llama("reward", job.vocab)), job)
    step, state = stepping(reward_loss(model.apply), model, PAIRS)
    mask = [False] * PROMPT + [True] * ANSWER
    every = [
        (data.Example(p + c, mask), data.Example(p + r, mask)) for p, c, r in zip(*pairs(job.vocab))
    ]
    return taken(step, state, map(partial(pair_batch, pad=PAD), parts(every, PAIRS)))


def of_grpo(job: Job) -> Callable[[], float]:
    model, draw = policy(job)
    method = recipes.grpo._replace(  # what TRL's defaults are
        group=GROUP, kl_coef=0.0, weights=weights.token_mean,
        advantages=partial(
            methods.of_scores, advantages=partial(groups.grpo_advantages, ddof=1, eps=1e-4)
        ),
    )  # fmt: skip
    step, state = stepping(
        method.loss(model.apply, token_logprobs=read_by(job).entropies), model, PROMPTS * GROUP
    )
    roles = Asking(draw, draw, answered(model, job), model.params, lambda rollout, _: paid(rollout))
    every = prompts(PROMPTS, job.vocab)

    def ask(number: int) -> Asked:
        mine = every[number * PROMPTS : (number + 1) * PROMPTS]
        return Asked(prompt_batch(mine, PAD), torch.arange(PROMPTS))

    return iterated(grpo(method, roles, ask, step, pad=PAD), state)


def paid(rollout: Rollout) -> Tensor:
    return torch.tensor([worth(ids) for ids in completions(rollout)])


def of_ppo(job: Job) -> Callable[[], float]:
    actor, draw = policy(job)
    scores = computing(classifier(llama("reward", job.vocab)), job)
    module = llama("value", job.vocab)
    values = value_model(module, KEY)._replace(params=classifier(module).params)
    critic = computing(values, job)
    method = recipes.ppo._replace(kl_reward=KL, minibatches=1)
    loss = method.loss(actor.apply, token_logprobs=read_by(job).entropies)
    actor_step, actor_state = stepping(loss, actor, ROLLOUTS)
    critic_step, critic_state = stepping(value_loss(critic.apply, clip=0.2), critic, ROLLOUTS)
    score = compiled(scores.apply)
    roles = Roles(
        draw, answered(actor, job), compiled(critic.apply), actor.params,
        lambda rollout: score(scores.params, rollout.tokens, rollout.attention),
    )  # fmt: skip
    every = prompts(ROLLOUTS, job.vocab)
    iteration = ppo(
        method, roles, lambda n: prompt_batch(every[n * ROLLOUTS : (n + 1) * ROLLOUTS], PAD),
        actor_step, critic_step,
    )  # fmt: skip
    return iterated(iteration, PpoState(actor_state, critic_state, torch.tensor(KL)))


JOBS = {"sft": of_sft, "dpo": of_dpo, "reward": of_reward, "grpo": of_grpo, "ppo": of_ppo}


def main() -> None:
    """python race_ours.py NAME VOCAB DTYPE"""
    name, vocab, dtype = sys.argv[1:]
    Lap().run(JOBS[name](Job(name, int(vocab), dtype)))


if __name__ == "__main__":
    main()
