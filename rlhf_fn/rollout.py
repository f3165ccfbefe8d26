"""Sampling: a decoder, its parameters, prompts and a key per row make a rollout.

What is sampled at step n of a row is a function of its prompt, its key and n: not of the other
rows, of the padding, or of how long the others run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from rlhf_fn import checks, tree
from rlhf_fn.decoding import Decoder
from rlhf_fn.distributions import _sample_and_log_prob
from rlhf_fn.models import Params
from rlhf_fn.random import fold_in
from rlhf_fn.tree import Tree, wide


class Prompts(NamedTuple):
    """Left-padded: `attention` is True on the tokens, which end at the last position."""

    tokens: Int[Tensor, "batch prompt"]
    attention: Bool[Tensor, "batch prompt"]


class Rollout(NamedTuple):
    """Prompts and answers, padded on both sides; what is aligned is aligned with `tokens`.

    `attention` is True on prompt and answer, `mask` on the answer: the sampled tokens up to and
    with the first stop. `logprobs` are those of the distribution sampled from, 0 off the mask.
    """

    tokens: Int[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]


class Engine(NamedTuple):
    """How a decoder is run: its `prefill`, the `turn` of its `decode`, and the sizes they have.

    `size(n)` rows are read where n are to go on, and as many columns of the cache where n are
    filled: n itself, or the next of a few sizes. `some(alive)` says whether there is another turn.
    """

    prefill: Callable[..., tuple[Tensor, Tree]]
    turn: Callable[..., tuple[tuple[Tensor, Tensor, Tensor], Tree]]
    size: Callable[[int], int]
    some: Callable[[Tensor], bool] = lambda alive: bool(alive.any())


def sampling_logits(
    logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*batch vocab"]:
    """The logits that are sampled from: tempered, then −∞ outside the support.

    z/τ − max z/τ on the `top_k` likeliest tokens, and of these on the fewest that hold `top_p` of
    their probability. A trainer's log-probs are the sampler's only if they are taken from these.
    float32 from half precision.

    Holtzman et al. 2020 (top-p): https://arxiv.org/abs/1904.09751

    Raises:
        TypeError: `top_k` is not an int.
        ValueError: `temperature` is not finite and > 0, `top_k` < 1, or `top_p` outside of (0, 1].
    """
    _check_support(temperature, top_k, top_p)
    logits = logits.to(wide(logits))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and (top_p is None or top_p == 1):
        return logits
    if top_k is None:
        ranked, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:  # 16 rows of 32,000: 1.3 ms, the sort 40
        ranked, ids = logits.topk(min(top_k, logits.shape[-1]))
    if top_p is not None and top_p < 1:
        probs = ranked.softmax(-1, dtype=torch.float64)
        likelier = probs.cumsum(-1) - probs  # the mass before each; 0 before the first
        ranked = torch.where(likelier < top_p, ranked, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, ranked)


def draw(
    logits: Float[Tensor, "rows vocab"],
    step: int | Int[Tensor, ""],
    keys: Int64[Tensor, "rows 2"],
    alive: Bool[Tensor, " rows"],
    temperature: float | Tensor,
    stops: Int64[Tensor, " stops"],
    *,
    pad: int,
    **support: Any,
) -> tuple[Int64[Tensor, " rows"], Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """The next token of every row, its log-prob, and whether the row goes on after it.

    Rows that are not alive are given `pad` and 0. `support`: `top_k` and `top_p`.
    """
    z = sampling_logits(logits, temperature=temperature, **support)
    drawn, logprobs = _sample_and_log_prob(z, fold_in(keys, step))
    logprobs = torch.where(alive, logprobs, 0.0)
    tokens = torch.where(alive, drawn, pad)
    return tokens, logprobs, alive & ~torch.isin(drawn, stops)


def turn(
    decode: Callable[..., tuple[Tensor, Tree]],
    params: Params,
    tokens: Int64[Tensor, " rows"],
    attention: Bool[Tensor, "rows filled"],
    index: int | Int[Tensor, ""],
    cache: Tree,
    *drawing: Any,
    **options: Any,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tree]:
    """Read the tokens at `index` and `draw` the next ones; the cache is donated."""
    logits, cache = decode(params, tokens, attention, index, cache)
    return draw(logits, *drawing, **options), cache


@torch.no_grad()
def sample(
    decoder: Decoder | Engine,
    params: Params,
    prompts: Prompts,
    keys: Int64[Tensor, "answers 2"],
    *,
    max_new_tokens: int,
    temperature: float | Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int],
    pad: int,
) -> Rollout:
    """Answer every prompt with tokens drawn from the policy until a `stop` or `max_new_tokens`.

    yₙ ~ softmax(sampling_logits(z(x, y₍<ₙ₎))),   drawn with the key `fold_in(keysᵢ, n)`

    A key is an answer: with G keys for each prompt, those of a prompt one after the other, it is
    read once and answered G times. The rollout is `prompt + max_new_tokens` wide whatever was
    drawn, with `pad` after each answer; `pad` may be a stop. No `stop` at all is allowed: then
    every answer has the full length. Once half of the rows have stopped, the model reads the others
    alone. `engine.compiled(decoder)` in the place of `decoder` draws the same with compiled turns.

    Raises:
        TypeError: `max_new_tokens` or `top_k` is not an int, `attention` not bool, keys not int64.
        ValueError: an option outside of its range (`sampling_logits`), ids outside of the
            vocabulary, prompts that are empty, not left-padded or too long for the model, keys not
            as many for each prompt, or logits that are not finite.
    """
    _check_support(temperature, top_k, top_p)
    _check_prompts(prompts, keys, max_new_tokens)
    engine = eager(decoder) if isinstance(decoder, Decoder) else decoder
    start = prompts.tokens.shape[-1]
    end = start + max_new_tokens
    logits, cache = decoder.prefill(params, prompts.tokens, prompts.attention, end)
    stops, options = _ids(stop, pad, logits), {"pad": pad, "top_k": top_k, "top_p": top_p}
    answers = torch.arange(len(keys), device=keys.device)
    of = answers // (len(keys) // len(prompts.tokens))  # their prompts
    room = (0, max_new_tokens)
    tokens, attention = (F.pad(x, room, value=v)[of] for x, v in zip(prompts, (pad, False)))
    logprobs = torch.zeros_like(tokens, dtype=wide(logits))
    read = _answered((logits, cache), of)
    written = tokens, attention, logprobs
    _answer(engine, params, written, start, *read, keys, temperature, stops, **options)
    _check_finite(logprobs, start)
    new = torch.arange(end, device=attention.device) >= start
    return Rollout(tokens, attention, attention & new, logprobs)


def eager(decoder: Decoder) -> Engine:
    """The decoder as it is, of just the rows and the columns that there are."""
    return Engine(decoder.prefill, partial(turn, decoder.decode), lambda n: n)


def completions(rollout: Rollout) -> list[list[int]]:
    """The sampled ids of every row, its stop included: what a tokenizer decodes for a reward."""
    return [row[kept].tolist() for row, kept in zip(rollout.tokens, rollout.mask)]


def _answer(
    engine: Engine,
    params: Params,
    written: tuple[Tensor, Tensor, Tensor],
    start: int,
    logits: Tensor,
    cache: Tree,
    keys: Tensor,
    temperature: float | Tensor,
    stops: Tensor,
    **options: Any,
) -> None:
    """Write tokens, attention and log-probs from `start` on, until every row has stopped."""
    tokens, attention, logprobs = written
    rows = torch.arange(len(keys), device=keys.device)  # those that are read
    alive = torch.ones_like(rows, dtype=torch.bool)  # of these
    end = tokens.shape[-1]
    drawn, logprob, goes_on = draw(logits, 0, keys, alive, temperature, stops, **options)
    for index in range(start, end):
        tokens[rows, index] = drawn
        attention[rows, index] = alive
        logprobs[rows, index] = logprob
        alive = goes_on
        if index + 1 == end or (len(stops) and not engine.some(alive)):
            break
        rows, alive, cache = _running(rows, alive, cache, engine.size)
        columns = min(engine.size(index + 1), end - 1)  # nothing reads the last token
        (drawn, logprob, goes_on), cache = engine.turn(
            params, tokens[rows, index], attention[rows, :columns], index, cache,
            index + 1 - start, keys[rows], alive, _of(temperature, rows), stops, **options,
        )  # fmt: skip


def _running(
    rows: Tensor, alive: Tensor, cache: Tree, size: Callable[[int], int]
) -> tuple[Tensor, Tensor, Tree]:
    """The rows to read: those that go on, and up to `size` of the others, once these are half."""
    number = size(int(alive.sum()))
    if 2 * number > len(rows):
        return rows, alive, cache
    kept = alive.int().argsort(descending=True, stable=True)[:number]
    return rows[kept], alive[kept], tree.map(lambda x: x[kept], cache)


def _answered(read: tuple[Tensor, Tree], of: Tensor) -> tuple[Tensor, Tree]:
    """What was read of the prompts, for each of their answers; no copy where each has one."""
    once = len(of) == len(read[0])
    return read if once else tree.map(lambda x: x[of], read)


def _of(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    per_row = isinstance(temperature, Tensor) and temperature.ndim > 0
    return temperature[rows] if per_row else temperature  # type: ignore[index]


def _check_support(temperature: float | Tensor, top_k: int | None, top_p: float | None) -> None:
    checks.positive(temperature=temperature)
    if top_k is not None:
        checks.count(least=1, top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number in (0, 1], got {top_p}; None keeps every token")


def _check_prompts(prompts: Prompts, keys: Tensor, max_new_tokens: int) -> None:
    checks.count(least=1, max_new_tokens=max_new_tokens)
    checks.bool_mask(prompts.attention, name="attention")
    checks.same_shape(tokens=prompts.tokens, attention=prompts.attention)
    batch = prompts.tokens.shape[0]
    if keys.ndim != 2 or keys.shape[-1] != 2 or not batch or not len(keys) or len(keys) % batch:
        raise ValueError(
            f"keys must be one per answer, and as many for each of the {batch} prompts, got "
            f"{tuple(keys.shape)}; make them with random.split(key, {batch})"
        )
    if checks.concrete(prompts.attention):
        gaps = prompts.attention[:, :-1] & ~prompts.attention[:, 1:]
        bad = gaps.any(-1) | ~prompts.attention.any(-1)
        if bad.any():
            row = int(bad.int().argmax())
            raise ValueError(
                f"prompts: row {row} is empty or not left-padded; expected padding, then at least "
                "one token, up to the last position"
            )


def _ids(stop: Sequence[int], pad: int, logits: Tensor) -> Tensor:
    """The stops as a tensor: stops and pad are ids that the model has."""
    stops = torch.tensor([*stop], dtype=torch.int64, device=logits.device)
    checks.token_ids(stops, logits.shape[-1], name="stop")
    checks.token_ids(torch.tensor([pad]), logits.shape[-1], name="pad")
    return stops


def _check_finite(logprobs: Tensor, start: int) -> None:
    bad = ~logprobs.isfinite()
    if bad.any():
        row, index = bad.nonzero()[0].tolist()
        raise checks.NonFiniteError(
            f"params: the logits of row {row} are not finite at new token {index - start}; "
            "expected a policy that has not diverged, look at the last training steps"
        )
