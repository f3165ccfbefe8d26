"""The stages of alignment, each a fold of one iteration: SFT, reward model, PPO."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_fn import config as configuration
from rlhf_fn import data, optim, random, recipes, tree
from rlhf_fn.batches import asked
from rlhf_fn.collate import PairExample, batches, chunks, pair_batch, prompt_batch, sft_batch
from rlhf_fn.data import Example
from rlhf_fn.fused import InPlace
from rlhf_fn.losses import of_tokens
from rlhf_fn.methods import ActorCritic, whitened_gae
from rlhf_fn.models import Functional, Params, frozen
from rlhf_fn.pair_losses import PairBatch, pair_scores
from rlhf_fn.policy import clipped_surrogate
from rlhf_fn.ppo import PpoState, Roles, near, ppo
from rlhf_fn.precision import cast
from rlhf_fn.ranks import by_rows
from rlhf_fn.reading import reading
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import Run
from rlhf_fn.sampler import sampler
from rlhf_fn.sharding import model_by_rows, shared_for
from rlhf_fn.steps import Step, TrainState, reward_loss, sft_loss, value_loss
from rlhf_fn.train import fold
from rlhf_fn.updates import begun, computing, cosine, fused, precision, readable, step_of


class Best(NamedTuple):
    """A state in training, and the parameters that did best on the held-out rows so far."""

    train: TrainState
    params: Params
    loss: Float[Tensor, ""]
    waited: Int[Tensor, ""]  # evaluations since


def folded(options: Any, iteration: Any, state: Any, key: Tensor, *, stage: str, run: Run, **more):
    """`fold`, with the log and the checkpoints of a run."""
    return fold(
        iteration, state, key, stage=stage, steps=options.steps, log=run.log,
        checkpoints=run.checkpoints(stage), every=options.every, **more,
    )  # fmt: skip


def iteration_of(step: Step, batch: Callable[[int], Any]):
    """A fold's iteration from a step and its batches; counts the tokens it saw."""

    def iteration(state: TrainState, key: Tensor, number: int):
        rows = tree.beside(batch(number), state.params)
        seen = sum(int(x.sum()) for name, x in rows._asdict().items() if "attention" in name)
        state, metrics = step(state, rows, key)
        return state, metrics | {"tokens": torch.tensor(float(seen))}

    return iteration


@torch.no_grad()
def nll(logprobs: Callable, params: Params, examples: Sequence[Example], pad: int) -> float:
    """The mean negative log-likelihood of the completions' tokens, nats.

    `logprobs` as of `next_token_logprobs`.
    """
    total, count = 0.0, 0
    for rows in chunks(examples):
        padded = data.pad(rows, side="right", pad=pad)
        tokens, attention, mask = tree.beside(padded, params)
        per_token = by_rows(partial(logprobs, params))(tokens, attention)
        total += per_token[mask].double().sum().item()
        count += int(mask.sum())
    return -total / count


def sft(
    options: configuration.Sft,
    model: Functional,
    train: Sequence[Example],
    *,
    run: Run,
    key: Tensor,
    pad: int,
    stage: str = "sft",
) -> Params:
    """Maximise the likelihood of the completions; the tuned parameters.

    `model` is made as `reading(options)` says.
    """
    order_key, fold_key = random.split(key)
    optimizer = fused(cosine(options), options, weight_decay=options.weight_decay)
    model, time = computing(model, options), max(len(row.tokens) for row in train)
    loss = sft_loss(model.apply, token_logprobs=reading(options).hits)
    step = step_of(loss, optimizer, options, rows=options.batch, time=time)
    make = partial(sft_batch, pad=pad)
    batch = batches(
        train, options.batch, order_key, make, window=options.window, examples=lambda row: (row,)
    )
    start = begun(model.params, optimizer)
    state = folded(options, iteration_of(step, batch), start, fold_key, stage=stage, run=run)
    return state.params


@torch.no_grad()
def preferences(
    apply: Callable, params: Params, pairs: Sequence[PairExample], pad: int
) -> tuple[float, list[float]]:
    """(mean Bradley–Terry loss, 1 where the chosen text scores higher, ½ for ties)."""

    def scores(batch: PairBatch) -> tuple[Tensor, Tensor]:
        return pair_scores(apply, params, shared_for(params, asked(batch)))

    losses, right = [], []
    for rows in chunks(pairs):
        batch = tree.beside(pair_batch(rows, pad), params)
        chosen, rejected = by_rows(scores)(batch)
        losses += torch.nn.functional.softplus(rejected - chosen).tolist()
        right += ((chosen > rejected) + 0.5 * (chosen == rejected)).tolist()
    return sum(losses) / len(losses), right


def reward(
    options: configuration.Reward,
    model: Functional,
    train: Sequence[PairExample],
    held_out: Sequence[PairExample],
    *,
    run: Run,
    key: Tensor,
    pad: int,
    stage: str = "reward",
) -> Params:
    """Fit Bradley–Terry scores until the held-out loss stops falling; the best parameters."""
    order_key, fold_key = random.split(key)
    optimizer = fused(cosine(options), options, weight_decay=options.weight_decay)
    model = computing(model, options, out=torch.float32)
    time = max(len(row.tokens) for pair in train for row in pair)
    loss, size, make = reward_loss(model.apply), options.batch, partial(pair_batch, pad=pad)
    step = step_of(loss, optimizer, options, rows=size, time=time, share=True)
    plain = iteration_of(step, batches(train, size, order_key, make, window=options.window))

    def iteration(state: Best, key: Tensor, number: int):
        new, metrics = plain(state.train, key, number)
        state = state._replace(train=new)
        if (number + 1) % options.every == 0 or number + 1 == options.steps:
            params = readable(new.params, options)
            loss, right = preferences(model.apply, params, held_out, pad)
            if loss < state.loss.item():
                state = Best(new, frozen(new.params), torch.tensor(loss), torch.tensor(0))
            else:
                state = state._replace(waited=state.waited + 1)
            metrics |= {
                "held-out loss": torch.tensor(loss),
                "held-out accuracy": torch.tensor(sum(right) / len(right)),
            }
        return state, metrics

    start = begun(model.params, optimizer)
    state = folded(
        options, iteration, Best(start, model.params, torch.tensor(math.inf), torch.tensor(0)),
        fold_key, stage=stage, run=run, stop=lambda s: int(s.waited) >= options.patience,
    )  # fmt: skip
    return state.params


def align(
    options: configuration.Ppo,
    policy: Any,
    scores: Callable[[Rollout], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    actor: Functional,
    critic: Functional,
    run: Run,
    key: Tensor,
    pad: int,
    stop: Sequence[int],
    stage: str = "ppo",
) -> Params:
    """PPO from `policy` (also the frozen reference) against `scores`; the tuned parameters.

    Args:
        policy: a causal LM module, to sample from.
        actor: the same as `reading(options).make` made it, and the parameters it starts from.
        critic: values aligned with tokens, and the parameters they start from.
        prompts: token ids, one list per prompt.
    """
    order_key, fold_key = random.split(key)
    read, method = reading(options), ppo_method(options)
    actor, critic = computing(actor, options), computing(critic, options, out=torch.float32)
    actor_optimizer, critic_optimizer = _optimizers(options)
    width = max(map(len, prompts))
    rows = -(-options.batch // method.minibatches)
    step = partial(step_of, options=options, rows=rows, time=width + options.new_tokens)
    how = {"temperature": method.temperature, "stop": stop, "pad": pad}
    by_model = partial(model_by_rows, gather=partial(readable, options=options))
    roles = Roles(
        sampler(policy, options, actor.params, width=width, **how),
        by_model(read.answers(actor.apply, method, options.new_tokens)), by_model(critic.apply),
        cast(actor.params, precision(options)), by_rows(scores),
    )  # fmt: skip
    loss = method.loss(actor.apply, token_logprobs=read.entropies)
    iteration = ppo(
        method, roles, batches(prompts, options.batch, order_key, partial(prompt_batch, pad=pad)),
        step(loss, actor_optimizer, accept=near(method)),
        step(value_loss(critic.apply, clip=method.value_clip), critic_optimizer),
    )  # fmt: skip
    start = PpoState(
        begun(actor.params, actor_optimizer), begun(critic.params, critic_optimizer),
        torch.tensor(method.kl_reward),
    )  # fmt: skip
    return folded(options, iteration, start, fold_key, stage=stage, run=run).actor.params


def _optimizers(options: configuration.Ppo) -> tuple[InPlace, InPlace]:
    updates = options.steps * options.epochs * options.minibatches
    warmup = min(options.warmup, updates - 1)
    return tuple(
        fused(optim.linear_schedule(lr, steps=updates, warmup=warmup), options)
        for lr in (options.lr, options.critic_lr)
    )  # type: ignore[return-value]


def ppo_method(options: configuration.Ppo) -> ActorCritic:
    """PPO, with the settings that the options have."""
    return recipes.ppo._replace(
        kl_reward=options.kl_coef,
        target_kl=options.target_kl or None,
        estimate=partial(whitened_gae, discount=options.discount, lam=options.lam),
        surrogate=of_tokens(clipped_surrogate, clip_low=options.clip, clip_high=options.clip),
        entropy_coef=options.entropy_coef,
        value_clip=options.clip,
        temperature=options.temperature,
        epochs=options.epochs,
        minibatches=options.minibatches,
        max_kl=options.max_kl,
    )
