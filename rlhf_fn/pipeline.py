"""The embedded default: SFT → reward model → PPO on the toy grammar, from scratch."""

from collections.abc import Sequence
from typing import Any

from rlhf_fn import config as configuration
from rlhf_fn import data, random, report, stages, toy
from rlhf_fn.heads import reward_model, save_reward_model, value_model
from rlhf_fn.judge import duel, texts
from rlhf_fn.models import causal_lm, save_policy
from rlhf_fn.readers import Demonstration, Pair
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import Run


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
        lr=1e-3, critic_lr=1e-3, kl_coef=0.3, every=10, seed=seed,
    )  # fmt: skip
    return sft, reward, ppo


def align_toy(
    options: configuration.Pipeline, run: Run
) -> tuple[dict[str, str], Sequence[tuple[str, str, str]]]:
    """Train the four models and let the true preference judge PPO over SFT on unseen prompts."""
    keys = iter(random.split(random.key(options.seed), 9))
    sft, reward, ppo = settings(options.out, options.seed)
    tokenizer = toy.tokenizer()
    encoder = data.encoder(tokenizer)
    pad, stop = encoder.pad, (encoder.eos,)
    asked, unseen = data.split(toy.prompts(), next(keys), 0.25)

    many = [asked[i % len(asked)] for i in range(4096)]
    demonstrations = [Demonstration(*x) for x in toy.demonstrations(many, next(keys))]
    examples = data.tokenise_demonstrations(encoder, demonstrations, max_length=64).examples
    module = toy.model(len(tokenizer), options.seed)
    policy = stages.sft(sft, causal_lm(module), examples, run=run, key=next(keys), pad=pad)
    module.load_state_dict(policy)

    pairs = [Pair(*x) for x in toy.preferences(many, next(keys))]
    judged = data.tokenise_pairs(encoder, pairs, max_length=64).examples
    scores = reward_model(module, next(keys))
    scores_params = stages.reward(
        reward, scores, judged[512:], judged[:512], run=run, key=next(keys), pad=pad
    )
    _, right = stages.preferences(scores.apply, scores_params, judged[:512], pad)

    def score(rollout: Rollout):
        return scores.apply(scores_params, rollout.tokens, rollout.attention)

    tuned = stages.align(
        ppo, module, score, [data.encode_prompt(encoder, x) for x in asked],
        critic=value_model(module, next(keys))._replace(params=scores_params),
        run=run, key=next(keys), pad=pad, stop=stop,
    )  # fmt: skip
    verdict = duel(
        module, tuned, policy,
        stages.prompt_batches([data.encode_prompt(encoder, x) for x in unseen] * 4, pad),
        lambda rollout: [toy.true_preference(*x) for x in texts(tokenizer, rollout)],
        tokenizer, next(keys), new_tokens=ppo.new_tokens, temperature=ppo.temperature,
        stop=stop, pad=pad,
    )  # fmt: skip
    save_policy(module, tuned, run.directory / "policy")
    save_reward_model(module, scores_params, run.directory / "reward_model")
    for name in ("policy", "reward_model"):
        tokenizer.save_pretrained(run.directory / name)
    accuracy = {"reward model's held-out accuracy": str(report.wilson(sum(right), len(right)))}
    return verdict.results | accuracy, verdict.samples[:16]
