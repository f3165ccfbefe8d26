"""`rlhf-fn dpo`: a policy learns from preference pairs."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rlhf_fn import config as configuration
from rlhf_fn import data, random, report
from rlhf_fn.config import ConfigError
from rlhf_fn.frame import at_least, finish, read_pairs, split
from rlhf_fn.loading import Policy, check_length, load_policy, without_weights
from rlhf_fn.models import Functional
from rlhf_fn.offline import compared, measured, mismatched, prefer
from rlhf_fn.online import recipe
from rlhf_fn.pair_methods import Offline, log_ratio
from rlhf_fn.ranks import place
from rlhf_fn.readers import Pair
from rlhf_fn.reading import reading
from rlhf_fn.run import opened
from rlhf_fn.trainable import save_trained, trainable
from rlhf_fn.updates import computing, device, precision, readable, resident


def dpo(options: configuration.Dpo, *, resume: bool) -> None:
    """Tune a policy by a recipe of `recipes.py`; the margins of held-out pairs before and after."""
    method = _method(options)
    policy = load_policy(options.model, device(options), sliced=options.shards > 1)
    split_key, stage_key, lora_key = random.split(random.key(options.seed), 3)
    found, bad = read_pairs(options.data)
    pairs = list(dict.fromkeys(found))
    train, test = _sides(options, method, policy, pairs, split_key)
    read = reading(options)
    pad, base = policy.encoder.pad, computing(read.make(policy.module), options)
    tuned = trainable(
        policy.module, base, options.lora, lora_key, make=read.make, dtype=precision(options),
        keep=partial(resident, options=options),
    )  # fmt: skip
    policy, apply, size = without_weights(policy), base.apply, options.batch
    del base

    def reference() -> Functional | None:
        """Whole, where it is to be, no longer than it is asked."""
        return Functional(apply, readable(tuned.start, options)) if method.reference else None

    loss = method.loss(tuned.model.apply, token_logprobs=read.logprobs)
    with opened(options, resume=resume) as run:
        rows, held = (
            compared(reference(), x, size=size, pad=pad, token_logprobs=read.logprobs)
            for x in (train, test)
        )
        params = prefer(
            options, loss, tuned.model.params, rows, held, run=run, key=stage_key, pad=pad
        )
        before, after = (
            measured(loss, readable(each, options), held, size=size, pad=pad)
            for each in (tuned.model.params, params)
        )
        save_trained(run.directory, policy, tuned, params)
        counts = len(train), len(test), len(pairs) - len(train) - len(test)
        name = "pairs (train, held out, too long or too alike to use, repeated, not readable)"
        counted = {name: ", ".join(map(str, (*counts, len(found) - len(pairs), bad)))}
        finish(run, options.recipe, _results(method, before, after, len(test)) | counted)


def _method(options: configuration.Dpo) -> Offline:
    method = recipe(options.recipe, Offline)
    if method.whole and options.accumulate > 1:
        raise ConfigError(
            f"--accumulate is {options.accumulate}, but {options.recipe} compares all pairs of a "
            "batch with each other, so that micro-batches would change it; leave it at 1"
        )
    if method.whole and place().ranks > 1:
        raise ConfigError(
            f"{options.recipe} compares all pairs of a batch with each other, but each of the "
            f"{place().ranks} ranks sees its own; start one process, without torchrun"
        )
    return method


def split_by_prompt(pairs: Sequence[Pair], key: Tensor, share: float) -> tuple[list, list]:
    """(kept, held out): pairs of one prompt are on one side; a pair without any is its own."""
    asked = [pair.prompt or str(pair) for pair in pairs]
    held = set(split(list(dict.fromkeys(asked)), key, share, "distinct prompts of --data")[1])
    sides: tuple[list, list] = [], []
    for pair, name in zip(pairs, asked):
        sides[name in held].append(pair)
    return sides


def _sides(
    options: configuration.Dpo, method: Offline, policy: Policy, pairs: Sequence[Pair], key: Tensor
) -> list[Sequence[tuple[data.Example, ...]]]:
    """What is trained on and what is held out, tokenised."""
    texts = split_by_prompt(pairs, key, options.held_out)
    sides = [_fitting(policy.encoder, side, options, method) for side in texts]
    at_least(1, sides[0], "--data for training")
    at_least(1, sides[1], "--data held out")
    rows = [x.tokens for side in sides for row in side for x in row]
    check_length(policy.module, rows, 0, "--max-length")
    return sides


def _fitting(
    encoder: data.Encoder, pairs: Sequence[Pair], options: configuration.Dpo, method: Offline
) -> Sequence[tuple[data.Example, ...]]:
    """The pairs that fit, with what else the method compares."""
    examples = data.tokenise_pairs(encoder, pairs, max_length=options.max_length).examples
    return mismatched(examples, options.max_length) if method.mismatched and examples else examples


def _results(
    method: Offline, before: dict[str, float], after: dict[str, float], pairs: int
) -> dict[str, str]:
    unit = "nats per answer" if method.reward is log_ratio else "nats per token"
    reward = "log π/π_ref" if method.reference else "log π"
    margins = [x["reward/chosen"] - x["reward/rejected"] for x in (before, after)]
    moved = [after[name] - before[name] for name in ("logprob/chosen", "logprob/rejected")]
    return {
        f"held-out accuracy of {reward} before": f"{before['accuracy']:.3f}",
        f"held-out accuracy of {reward} after, 95 % interval": str(
            report.wilson(after["accuracy"] * pairs, pairs)
        ),
        f"held-out margin before and after, {unit}": f"{margins[0]:.3f}, {margins[1]:.3f}",
        "held-out loss before and after": f"{before['loss']:.4f}, {after['loss']:.4f}",
        "log π after less before, nats per token (chosen, rejected)": (
            f"{moved[0]:+.3f}, {moved[1]:+.3f}"
        ),
    }
