"""The commands of `rlhf-fn`: read everything, then open the run, then work."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from rlhf_fn import config as configuration
from rlhf_fn import data, random, readers, report, stages
from rlhf_fn.config import ConfigError
from rlhf_fn.heads import (
    Functional,
    classifier,
    last_token,
    load_reward_model,
    mean_pool,
    reward_model,
    save_reward_model,
    value_model,
)
from rlhf_fn.judge import duel
from rlhf_fn.models import causal_lm, check_vocab, load_causal_lm, save_policy
from rlhf_fn.rollout import Rollout
from rlhf_fn.run import opened

POOLS = {"last": last_token, "mean": mean_pool}


class Policy(NamedTuple):
    module: PreTrainedModel
    tokenizer: Any
    encoder: data.Encoder
    stop: tuple[int, ...]


def load_policy(path: str) -> Policy:
    """A causal LM, its tokenizer, and every token that ends its generations."""
    module, tokenizer = load_causal_lm(path), AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_vocab(tokenizer, module)
    ends = module.generation_config.eos_token_id if module.generation_config else None
    stop = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return Policy(module, tokenizer, data.encoder(tokenizer), tuple(sorted(stop)))


def load_scores(path: str, tokenizer: Any) -> tuple[Functional, PreTrainedModel]:
    """A reward model as `apply(params, tokens, attention) -> scores`, and its module.

    Raises:
        ConfigError: it reads other tokens than the policy writes.
    """
    module, own = load_reward_model(path), AutoTokenizer.from_pretrained(path)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"reward model {path} has another vocabulary than the policy; train it from a model "
            "with the policy's tokenizer, because it scores the sampled ids themselves"
        )
    scores = classifier(module)
    pool = POOLS[getattr(module.config, "rlhf_fn_pool", "last")]
    if pool is not last_token:
        scores = Functional(reward_model(module, random.key(0), pool=pool).apply, scores.params)
    return scores, module


def _save_tuned(directory: Path, policy: Policy, params: dict[str, Tensor]) -> None:
    save_policy(policy.module, params, directory)
    policy.tokenizer.save_pretrained(directory)


def _print(results: dict[str, str]) -> None:
    for name, value in results.items():
        print(f"{name}: {value}")


def _read(paths: Sequence[str], read: Callable[[str], Any]) -> list[Any]:
    return [record for path in paths for record in read(path).records]


def _at_least(number: int, rows: Sequence[Any], what: str) -> None:
    if len(rows) < number:
        raise ConfigError(f"{what}: {len(rows)} usable, {number} or more are needed")


def sft(options: configuration.Sft, *, resume: bool) -> None:
    """Tune on instructions; held-out perplexity before and after."""
    policy = load_policy(options.model)
    key = random.key(options.seed)
    split_key, stage_key = random.split(key)
    demonstrations = _read(options.data, readers.read_instructions)
    kept, held = data.split(demonstrations, split_key, options.held_out)
    encode = policy.encoder
    train, test = (
        data.tokenise_demonstrations(encode, rows, max_length=options.max_length)
        for rows in (kept, held)
    )
    _at_least(1, train.examples, "--data for training")
    _at_least(1, test.examples, "--data held out")
    model = causal_lm(policy.module)
    with opened(options, resume=resume) as run:
        before = stages.nll(model.apply, model.params, test.examples, encode.pad)
        params = stages.sft(options, model, train.examples, run=run, key=stage_key, pad=encode.pad)
        after = stages.nll(model.apply, params, test.examples, encode.pad)
        _save_tuned(run.directory / "policy", policy, params)
        results = {
            "held-out perplexity before": f"{math.exp(before):.3f}",
            "held-out perplexity after": f"{math.exp(after):.3f}",
            "rows (train, held out, without room for a completion)": (
                f"{len(train.examples)}, {len(test.examples)}, {train.dropped + test.dropped}"
            ),
        }
        _finish(run, "Supervised fine-tuning", results)


def _finish(run: Any, title: str, results: dict[str, str], samples: Sequence[Any] = ()) -> None:
    _print(results)
    report.write(
        run.directory, title=title, results=results, records=run.log.records(), samples=samples
    )
    print(f"report: {run.directory / 'report.md'}")


def read_pairs(paths: Sequence[str]) -> list[readers.Pair]:
    """Pairs of JSON files, or sentences of a .pos (chosen) and a .neg file."""
    if sorted(Path(p).suffix for p in paths) == [".neg", ".pos"]:
        negative, positive = sorted(paths, key=lambda p: Path(p).suffix)
        return readers.read_sentences(positive, negative).records
    return _read(paths, lambda p: readers.read_pairs(p, on_bad="skip"))


def _backbone(path: str) -> PreTrainedModel:
    """The model at `path`: a causal LM, or the encoder it is."""
    kind = AutoConfig.from_pretrained(path)
    if any("CausalLM" in name or "LMHead" in name for name in kind.architectures or ()):
        return load_causal_lm(path)
    return AutoModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True)


def tokenised_pairs(
    encoder: data.Encoder, pairs: Sequence[readers.Pair], max_length: int
) -> list[stages.PairExample]:
    """Pairs as examples that keep their last `max_length` tokens: the answer is at the end."""
    whole = data.tokenise_pairs(encoder, pairs, max_length=2**30).examples
    cut = [data.PairExample(*(data.keep_end(e, max_length) for e in pair)) for pair in whole]
    return [pair for pair in cut if pair.chosen != pair.rejected]


def reward(options: configuration.Reward, *, resume: bool) -> None:
    """Train a reward model until its held-out loss stops falling."""
    module, tokenizer = _backbone(options.model), AutoTokenizer.from_pretrained(options.model)
    encode = data.encoder(tokenizer)
    key = random.key(options.seed)
    split_key, part_key, head_key, stage_key = random.split(key, 4)
    i, n = configuration.part(options.part)
    pairs = read_pairs(options.data)
    order = random.permutation(part_key, len(pairs)).tolist()
    kept, held = data.split([pairs[j] for j in order[i::n]], split_key, options.held_out)
    train, test = (tokenised_pairs(encode, rows, options.max_length) for rows in (kept, held))
    _at_least(1, train, "--data for training")
    _at_least(1, test, "--data held out")
    module.config.rlhf_fn_pool = options.pool
    module.config.pad_token_id = encode.pad
    model = reward_model(module, head_key, pool=POOLS[options.pool])
    with opened(options, resume=resume) as run:
        params = stages.reward(options, model, train, test, run=run, key=stage_key, pad=encode.pad)
        loss, right = stages.preferences(model.apply, params, test, encode.pad)
        save_reward_model(module, params, run.directory / "reward_model")
        tokenizer.save_pretrained(run.directory / "reward_model")
        results = {
            "held-out accuracy, 95 % interval": str(report.wilson(sum(right), len(right))),
            "held-out loss (log 2 is chance, 0.693)": f"{loss:.3f}",
            "pairs (train, held out)": f"{len(train)}, {len(test)}",
        }
        _finish(run, "Reward model", results)


def _scores(model: Functional) -> Callable[[Rollout], Tensor]:
    def score(rollout: Rollout) -> Tensor:
        return model.apply(model.params, rollout.tokens, rollout.attention)

    return score


def _weighted(parts: Sequence[tuple[float, Callable[[Rollout], Tensor]]]):
    """Σ wₖ rₖ: a reward and, say, a second one for safety."""
    return lambda rollout: torch.stack([w * score(rollout) for w, score in parts]).sum(0)


def tokenised_prompts(policy: Policy, texts: Sequence[str], length: int) -> list[list[int]]:
    """Prompts cut to their first `length` tokens."""
    return [data.encode_prompt(policy.encoder, text)[:length] for text in texts]


def ppo(options: configuration.Ppo, *, resume: bool) -> None:
    """Tune a policy against a reward model, and judge it by the same on held-out prompts."""
    policy = load_policy(options.model)
    scores, scorer = load_scores(options.reward, policy.tokenizer)
    parts = [(1.0, _scores(scores))]
    if options.safety:
        safety, _ = load_scores(options.safety, policy.tokenizer)
        parts.append((options.safety_weight, _scores(safety)))
    split_key, head_key, stage_key, judge_key = random.split(random.key(options.seed), 4)
    texts = list(dict.fromkeys(_read(options.prompts, readers.read_prompts)))
    kept, held = data.split(texts, split_key, options.held_out)
    train, test = (tokenised_prompts(policy, x, options.prompt_tokens) for x in (kept, held))
    critic = value_model(scorer, head_key)._replace(params=scores.params)
    judge = _weighted(parts)
    with opened(options, resume=resume) as run:
        params = stages.align(
            options, policy.module, judge, train, critic=critic, run=run,
            key=stage_key, pad=policy.encoder.pad, stop=policy.stop,
        )  # fmt: skip
        verdict = duel(
            policy.module, params, causal_lm(policy.module).params,
            stages.prompt_batches(test[:256], policy.encoder.pad),
            lambda rollout: judge(rollout).tolist(), policy.tokenizer, judge_key,
            new_tokens=options.new_tokens, temperature=options.temperature,
            stop=policy.stop, pad=policy.encoder.pad,
        )  # fmt: skip
        _save_tuned(run.directory / "policy", policy, params)
        _finish(run, "PPO, judged by its own reward model", verdict.results, verdict.samples[:16])


def evaluate(options: configuration.Evaluate, *, resume: bool = False) -> None:
    """Print how often a reward model prefers one policy over another, and their KL."""
    policy, base = load_policy(options.model), load_policy(options.reference)
    judge = _scores(load_scores(options.reward, policy.tokenizer)[0])
    texts = list(dict.fromkeys(_read(options.prompts, readers.read_prompts)))[: options.number]
    prompts = tokenised_prompts(policy, texts, options.prompt_tokens)
    verdict = duel(
        policy.module, causal_lm(policy.module).params, causal_lm(base.module).params,
        stages.prompt_batches(prompts, policy.encoder.pad),
        lambda rollout: judge(rollout).tolist(), policy.tokenizer, random.key(options.seed),
        new_tokens=options.new_tokens, temperature=options.temperature,
        stop=policy.stop, pad=policy.encoder.pad,
    )  # fmt: skip
    _print(verdict.results)


def pipeline(options: configuration.Pipeline, *, resume: bool) -> None:
    """SFT → reward model → PPO → evaluation on a grammar whose true preference is known."""
    from rlhf_fn import pipeline

    with opened(options, resume=resume) as run:
        results, samples = pipeline.align_toy(options, run)
        _finish(run, "The pipeline, judged by the true preference", results, samples)
