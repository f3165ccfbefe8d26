"""Answers of another engine: its tokens and log-probs as a `Rollout`, and what their error weighs.

An engine has kernels, a precision and perhaps weights of its own: it draws from μ where the trainer
says π_old. Its log-probs are log μ of what it drew; the trainer's, of the same tokens, make the
weights (`mismatch`) by which those of a batch are multiplied:

    rollout = rollout_of(prompts, *engine(prompts), ...)
    w, metrics = importance(logprobs, rollout, correction=partial(truncated_weights, clip=2.0))
    batch = batch._replace(old_logprobs=logprobs, weights=batch.weights * w)

Yao et al. 2025: https://fengyao.notion.site/off-policy-rl
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_fn import checks
from rlhf_fn.kl import k1, k3
from rlhf_fn.losses import Metrics
from rlhf_fn.mismatch import effective_sample_size
from rlhf_fn.rollout import Prompts, Rollout
from rlhf_fn.weights import token_mean, weighted_sum


def rollout_of(
    prompts: Prompts,
    answers: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float | None]],
    *,
    max_new_tokens: int,
    vocab: int,
    stop: Sequence[int],
    pad: int,
) -> Rollout:
    """What an engine answered, as `sample` would have returned it; float32.

    Args:
        answers: token ids with the stop, as many rows for each prompt, one after the other.
        logprobs: log μ of these tokens, of the tempered distribution they were drawn from.

    Raises:
        TypeError: ids that are no integers.
        ValueError: not as many answers for each prompt, other log-probs than tokens, one that is
            missing, not finite or > 0, an id outside of the vocabulary, tokens after a stop, an
            answer that is too long, or one that ends early without its stop.
    """
    _check_counts(prompts, answers, logprobs, max_new_tokens)
    of = torch.arange(len(answers)) // (len(answers) // len(prompts.tokens))
    start = prompts.tokens.shape[-1]
    tokens = torch.full((len(answers), start + max_new_tokens), pad)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    sampled = torch.zeros_like(tokens, dtype=torch.float32)
    tokens[:, :start] = prompts.tokens[of.to(prompts.tokens.device)]
    for i, (row, logs) in enumerate(zip(answers, logprobs)):
        ids, end = _ids(row, f"answers[{i}]", vocab), start + len(row)
        _check_end(row, i, stop, max_new_tokens)
        tokens[i, start:end], mask[i, start:end] = ids, True
        sampled[i, start:end] = _logprobs(logs, f"logprobs[{i}]", len(row))
    attention = mask.clone()
    attention[:, :start] = prompts.attention[of.to(prompts.tokens.device)]
    return Rollout(*(x.to(prompts.tokens.device) for x in (tokens, attention, mask, sampled)))


def importance(
    logprobs: Float[Tensor, "batch time"],
    rollout: Rollout,
    *,
    correction: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "batch time"], Metrics]:
    """w = correction(log π_old − log μ) on the answers, 0 off them, and how far the two are apart.

    The metrics: max |log π_old − log μ|, the estimates k1 and k3 of KL(μ ‖ π_old) in nats per
    token, the effective sample size of the ratios π_old/μ themselves, and the mean of w.

    Args:
        logprobs: log π_old, the trainer's own at the same temperature; aligned with tokens.
        correction: of log-ratios: `truncated_weights` or `masked_weights` with their bounds, say.

    Raises:
        ValueError: the shapes differ, or a log-prob of an answer is not finite.
    """
    mask = rollout.mask
    checks.same_shape(logprobs=logprobs, mask=mask)
    checks.finite(logprobs, mask, name="logprobs")
    ours, theirs = (torch.where(mask, x, 0.0) for x in (logprobs, rollout.logprobs))
    log_ratio, per_token = ours - theirs, token_mean(mask)
    weights = torch.where(mask, correction(log_ratio), 0.0)
    return weights, {
        "engine/difference": log_ratio.abs().max(),
        "engine/k1": weighted_sum(k1(theirs, ours), per_token),
        "engine/k3": weighted_sum(k3(theirs, ours), per_token),
        "engine/sample_size": effective_sample_size(log_ratio.exp(), mask),
        "engine/weight": weighted_sum(weights, per_token),
    }


def _check_counts(
    prompts: Prompts, answers: Sequence, logprobs: Sequence, max_new_tokens: int
) -> None:
    checks.count(least=1, max_new_tokens=max_new_tokens)
    batch = len(prompts.tokens)
    if not batch or not answers or len(answers) % batch:
        raise ValueError(
            f"answers has {len(answers)} rows, expected as many for each of the {batch} prompts"
        )
    if len(logprobs) != len(answers):
        raise ValueError(f"logprobs has {len(logprobs)} rows for {len(answers)} answers")


def _check_end(row: Sequence[int], i: int, stop: Sequence[int], most: int) -> None:
    if len(row) > most:
        raise ValueError(f"answers[{i}] has {len(row)} tokens, expected at most {most}")
    first = next((t for t, token in enumerate(row) if token in stop), None)
    if first is not None and first + 1 < len(row):
        raise ValueError(
            f"answers[{i}] goes on for {len(row) - first - 1} tokens after its stop at {first}; "
            "give the engine the same stops, or cut the answer there, and its log-probs"
        )
    if first is None and len(row) < most:
        raise ValueError(
            f"answers[{i}] ends after {len(row)} of {most} tokens without a stop of {[*stop]}; ask "
            "the engine to return the stop itself: it was sampled, and learns too"
        )


def _ids(row: Sequence[int], name: str, vocab: int) -> Tensor:
    ids = torch.tensor([*row]) if len(row) else torch.zeros(0, dtype=torch.int64)
    checks.token_ids(ids, vocab, name=name)
    return ids


def _logprobs(row: Sequence[float | None], name: str, number: int) -> Tensor:
    if len(row) != number:
        raise ValueError(f"{name} has {len(row)} numbers for {number} tokens")
    for t, x in enumerate(row):
        if x is None or not math.isfinite(x) or x > 0:
            raise ValueError(
                f"{name}[{t}] is {x}, expected a finite log-prob <= 0; ask the engine for the "
                "log-probs of the tokens it samples, after the temperature"
            )
    return torch.tensor([*row], dtype=torch.float32)
