"""The commands of `rlhf-fn`: read everything, then open the run, then work."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_fn import collate, data, random, readers, report, stages
from rlhf_fn import config as configuration
from rlhf_fn.frame import (
    at_least,
    finish,
    read,
    read_pairs,
    save_tuned,
    say,
    split,
    tokenised_pairs,
    tokenised_prompts,
)
from rlhf_fn.heads import Functional, save_reward_model, value_model
from rlhf_fn.judge import duel
from rlhf_fn.loading import (
    check_length,
    fresh_scores,
    load_policy,
    load_scores,
    load_tokenizer,
    without_weights,
)
from rlhf_fn.losses import next_token_logprobs
from rlhf_fn.models import causal_lm, check_vocab
from rlhf_fn.ranks import by_first, by_rows, place
from rlhf_fn.reading import made_by, reading
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import agree_on, fingerprints, opened
from rlhf_fn.sampler import at_once, sampling
from rlhf_fn.sharding import on_first
from rlhf_fn.updates import device, readable, resident


def sft(options: configuration.Sft, *, resume: bool) -> None:
    """Tune on instructions; held-out perplexity before and after."""
    policy = load_policy(options.model, device(options), sliced=options.shards > 1)
    key = random.key(options.seed)
    split_key, stage_key = random.split(key)
    demonstrations = read(options.data, readers.read_instructions)
    kept, held = split(demonstrations, split_key, options.held_out, "rows of --data")
    encode = policy.encoder
    train, test = (
        data.tokenise_demonstrations(encode, rows, max_length=options.max_length)
        for rows in (kept, held)
    )
    at_least(1, train.examples, "--data for training")
    at_least(1, test.examples, "--data held out")
    rows = [example.tokens for example in train.examples + test.examples]
    check_length(policy.module, rows, 0, "--max-length")
    read_by = reading(options)
    model = resident(read_by.make(policy.module), options)
    policy = without_weights(policy)
    logprobs = next_token_logprobs(model.apply, token_logprobs=read_by.logprobs)
    with opened(options, resume=resume) as run:
        before = stages.nll(logprobs, readable(model.params, options), test.examples, encode.pad)
        params = stages.sft(options, model, train.examples, run=run, key=stage_key, pad=encode.pad)
        after = stages.nll(logprobs, readable(params, options), test.examples, encode.pad)
        save_tuned(run.directory / "policy", policy, params)
        results = {
            "held-out perplexity before": f"{_exp(before):.3f}",
            "held-out perplexity after": f"{_exp(after):.3f}",
            "rows (train, held out, without room for a completion)": (
                f"{len(train.examples)}, {len(test.examples)}, {train.dropped + test.dropped}"
            ),
        }
        finish(run, "Supervised fine-tuning", results)


def _exp(x: float) -> float:
    return torch.tensor(x).exp().item()  # inf where math.exp raises


def reward(options: configuration.Reward, *, resume: bool) -> None:
    """Train a reward model until its held-out loss stops falling."""
    split_key, part_key, head_key, stage_key = random.split(random.key(options.seed), 4)
    module, model = fresh_scores(
        options.model, head_key, pool=options.pool, device=device(options),
        sliced=options.shards > 1, made_by=partial(made_by, options=options),
    )  # fmt: skip
    model = resident(model, options)
    tokenizer = load_tokenizer(options.model)
    check_vocab(tokenizer, module)
    encode = data.encoder(tokenizer)
    module.config.pad_token_id = encode.pad
    i, n = configuration.part(options.part)
    pairs, bad = read_pairs(options.data)
    order = random.permutation(part_key, len(pairs)).tolist()
    mine = [pairs[j] for j in order[i::n]]
    kept, held = split(mine, split_key, options.held_out, f"pairs in --part {options.part}")
    train, test = (tokenised_pairs(encode, rows, options.max_length) for rows in (kept, held))
    at_least(1, train, "--data for training")
    at_least(1, test, "--data held out")
    rows = [example.tokens for pair in train + test for example in pair]
    check_length(module, rows, 0, "--max-length")
    with opened(options, resume=resume) as run:
        params = stages.reward(options, model, train, test, run=run, key=stage_key, pad=encode.pad)
        loss, right = stages.preferences(model.apply, readable(params, options), test, encode.pad)
        by_first(save_reward_model)(module, on_first(params), run.directory / "reward_model")
        by_first(tokenizer.save_pretrained)(run.directory / "reward_model")
        results = {
            "held-out accuracy, 95 % interval": str(report.wilson(sum(right), len(right))),
            "held-out loss (log 2 is chance, 0.693)": f"{loss:.3f}",
            "pairs (train, held out, too alike to use, not readable)": (
                f"{len(train)}, {len(test)}, {len(mine) - len(train) - len(test)}, {bad}"
            ),
        }
        finish(run, "Reward model", results)


def _scores(model: Functional) -> Callable[[Rollout], Tensor]:
    def score(rollout: Rollout) -> Tensor:
        return model.apply(model.params, rollout.tokens, rollout.attention)

    return score


def _weighted(parts: Sequence[tuple[float, Callable[[Rollout], Tensor]]]):
    """Σ wₖ rₖ: a reward and, say, a second one for safety."""
    return lambda rollout: torch.stack([w * score(rollout) for w, score in parts]).sum(0)


def ppo(options: configuration.Ppo, *, resume: bool) -> None:
    """Tune a policy against a reward model, and judge it by the same on held-out prompts."""
    there = device(options)
    policy = load_policy(options.model, there, sliced=options.shards > 1)
    scorer, scores = load_scores(options.reward, policy.tokenizer, there)
    judges = [(1.0, scorer, scores)]
    if options.safety:
        module, safety = load_scores(options.safety, policy.tokenizer, there)
        judges.append((options.safety_weight, module, safety))
    split_key, head_key, stage_key, judge_key = random.split(random.key(options.seed), 4)
    texts = list(dict.fromkeys(read(options.prompts, readers.read_prompts)))
    kept, held = split(texts, split_key, options.held_out, "distinct --prompts")
    train, test = (tokenised_prompts(policy, x, options.prompt_tokens) for x in (kept, held))
    make = made_by(partial(value_model, key=head_key), options)
    critic = resident(make(scorer)._replace(params=scores.params), options)
    judge = _weighted([(weight, _scores(model)) for weight, _, model in judges])
    for module in (policy.module, *(module for _, module, _ in judges)):
        check_length(module, train + test, options.new_tokens, "--new-tokens")
    actor = resident(reading(options).make(policy.module), options)
    policy = without_weights(policy)
    with opened(options, resume=resume) as run:
        params = stages.align(
            options, policy.module, judge, train, actor=actor, critic=critic, run=run,
            key=stage_key, pad=policy.encoder.pad, stop=policy.stop,
        )  # fmt: skip
        verdict = duel(
            sampling(policy.module, options), params, actor.params,
            collate.prompt_batches(test[:256], policy.encoder.pad),
            lambda rollout, _: by_rows(judge)(rollout).tolist(), policy.tokenizer, judge_key,
            new_tokens=options.new_tokens, temperature=options.temperature,
            stop=policy.stop, pad=policy.encoder.pad,
        )  # fmt: skip
        save_tuned(run.directory / "policy", policy, params)
        finish(run, "PPO, judged by its own reward model", verdict.results, verdict.samples[:16])


def evaluate(options: configuration.Evaluate, *, resume: bool = False) -> None:
    """Print how often a reward model prefers one policy over another, and their KL."""
    if place().ranks > 1:
        agree_on(options, fingerprints(options))
    there = device(options)
    policy, base = load_policy(options.model, there), load_policy(options.reference, there)
    scorer, scores = load_scores(options.reward, policy.tokenizer, there)
    judge = by_rows(_scores(scores))
    texts = list(dict.fromkeys(read(options.prompts, readers.read_prompts)))[: options.number]
    prompts = tokenised_prompts(policy, texts, options.prompt_tokens)
    for module in (policy.module, base.module, scorer):
        check_length(module, prompts, options.new_tokens, "--new-tokens")
    verdict = duel(
        at_once(policy.module), causal_lm(policy.module).params, causal_lm(base.module).params,
        collate.prompt_batches(prompts, policy.encoder.pad),
        lambda rollout, _: judge(rollout).tolist(), policy.tokenizer, random.key(options.seed),
        new_tokens=options.new_tokens, temperature=options.temperature,
        stop=policy.stop, pad=policy.encoder.pad,
    )  # fmt: skip
    say(verdict.results)


def pipeline(options: configuration.Pipeline, *, resume: bool) -> None:
    """SFT → reward model → PPO → evaluation on a grammar whose true preference is known."""
    from rlhf_fn import pipeline

    with opened(options, resume=resume) as run:
        results, samples = pipeline.align_toy(options, run)
        finish(run, "The pipeline, judged by the true preference", results, samples)
