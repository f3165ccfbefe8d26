"""The embedded default: SFT → reward model → PPO on the toy grammar, from scratch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_fn import collate, data, random, report, stages, toy
from rlhf_fn import config as configuration
from rlhf_fn.heads import reward_model, save_reward_model, value_model
from rlhf_fn.judge import duel, texts
from rlhf_fn.loading import on
from rlhf_fn.models import Functional, causal_lm, save_policy
from rlhf_fn.ranks import by_first
from rlhf_fn.readers import Demonstration, Pair
from rlhf_fn.run import Run
from rlhf_fn.sampler import at_once
from rlhf_fn.updates import device


def settings(out: str, seed: int) -> tuple[Any, Any, Any]:
    """The options of the three stages."""
    sft = configuration.Sft(
        model="", data=(), out=out, steps=200, batch=64, lr=2e-3, every=50, seed=seed
    )
    reward = configuration.Reward(
        model="", data=(), out=out, steps=150, batch=32, lr=1e-3, every=25, seed=seed
    )
    ppo = configuration.Ppo(
        model="", reward="", prompts=(), out=out, steps=25, batch=96, new_tokens=26,
        lr=5e-4, critic_lr=1e-3, kl_coef=0.2, every=10, seed=seed,
    )  # fmt: skip
    return sft, reward, ppo


def align_toy(
    options: configuration.Pipeline, run: Run
) -> tuple[dict[str, str], Sequence[tuple[str, str, str]]]:
    """Train the four models and let the true preference judge PPO over SFT on unseen prompts."""
    split_key, sft_key, reward_key, ppo_key, judge_key = random.split(random.key(options.seed), 5)
    sft, reward, ppo = settings(options.out, options.seed)
    tokenizer = toy.tokenizer()
    encoder = data.encoder(tokenizer)
    asked, unseen = data.split(toy.prompts(), split_key, 0.25)
    many = [asked[i % len(asked)] for i in range(4096)]

    module = on(toy.model(len(tokenizer), options.seed), device(options))
    policy = _sft(sft, module, encoder, many, run, sft_key)
    module.load_state_dict(policy)
    scores, right = _reward(reward, module, encoder, many, run, reward_key)
    tuned = _ppo(ppo, module, scores, encoder, asked, run, ppo_key)
    verdict = duel(
        at_once(module), tuned, policy,
        collate.prompt_batches([data.encode_prompt(encoder, x) for x in unseen] * 4, encoder.pad),
        lambda rollout, _: [toy.true_preference(*x) for x in texts(tokenizer, rollout)],
        tokenizer, judge_key, new_tokens=ppo.new_tokens, temperature=ppo.temperature,
        stop=(encoder.eos,), pad=encoder.pad,
    )  # fmt: skip
    by_first(save_policy)(module, tuned, run.directory / "policy")
    by_first(save_reward_model)(module, scores.params, run.directory / "reward_model")
    for name in ("policy", "reward_model"):
        by_first(tokenizer.save_pretrained)(run.directory / name)
    accuracy = {"reward model's held-out accuracy": str(report.wilson(sum(right), len(right)))}
    return verdict.results | accuracy, verdict.samples[:16]


def _sft(options: Any, module: Any, encoder: Any, asked: list[str], run: Run, key: Tensor):
    write_key, stage_key = random.split(key)
    demonstrations = [Demonstration(*x) for x in toy.demonstrations(asked, write_key)]
    examples = data.tokenise_demonstrations(encoder, demonstrations, max_length=64).examples
    return stages.sft(options, causal_lm(module), examples, run=run, key=stage_key, pad=encoder.pad)


def _reward(
    options: Any, module: Any, encoder: Any, asked: list[str], run: Run, key: Tensor
) -> tuple[Functional, list[float]]:
    write_key, head_key, stage_key = random.split(key, 3)
    pairs = [Pair(*x) for x in toy.preferences(asked, write_key)]
    judged = data.tokenise_pairs(encoder, pairs, max_length=64).examples
    held, train = judged[:512], judged[512:]
    scores = reward_model(module, head_key)
    params = stages.reward(options, scores, train, held, run=run, key=stage_key, pad=encoder.pad)
    _, right = stages.preferences(scores.apply, params, held, encoder.pad)
    return scores._replace(params=params), right


def _ppo(
    options: Any, module: Any, scores: Functional, encoder: Any, asked: list[str], run: Run,
    key: Tensor,
):  # fmt: skip
    head_key, stage_key = random.split(key)
    return stages.align(
        options, module,
        lambda rollout: scores.apply(scores.params, rollout.tokens, rollout.attention),
        [data.encode_prompt(encoder, x) for x in asked],
        actor=causal_lm(module),
        critic=value_model(module, head_key)._replace(params=scores.params),
        run=run, key=stage_key, pad=encoder.pad, stop=(encoder.eos,),
    )  # fmt: skip
