"""Records into batches: tokens with explicit masks, padding, and the order of the rows.

Everything is a pure function: the rows of a step are a function of (key, step), so a resumed run
sees what an uninterrupted one would have seen. No mask is inferred from a token id, so a pad
token that is also the end-of-sequence token is fine.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from rlhf_fn import checks, random
from rlhf_fn.errors import TokenizerError
from rlhf_fn.readers import Demonstration, Pair

R = TypeVar("R")


class Example(NamedTuple):
    """The tokens of a prompt and its completion, and which of them belong to the completion."""

    tokens: list[int]
    mask: list[bool]


class PairExample(NamedTuple):
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Tokenised(Generic[R]):
    """Examples in the order of their records, and how many records did not fit."""

    examples: list[R]
    dropped: int


class Padded(NamedTuple):
    tokens: Int64[Tensor, "batch time"]
    attention: Bool[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]


class Encoder(NamedTuple):
    """A tokenizer, as a function and the three ids that frame a text.

    `bos` None writes no beginning; `pad` may equal `eos`.
    """

    encode: Callable[[str], list[int]]
    bos: int | None
    eos: int
    pad: int


def encoder(tokenizer: Any) -> Encoder:
    """The encoder of a Hugging Face tokenizer, whose own special tokens are switched off.

    Without a pad token, padding is done with the end-of-sequence token. To leave the beginning of
    sequence out, which suits models trained without one: `encoder(tokenizer)._replace(bos=None)`.

    Raises:
        TokenizerError: it has no end-of-sequence token, so no text would ever end.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise TokenizerError(
            "tokenizer: no EOS token, so a model would never learn to stop; set one, "
            'such as tokenizer.eos_token = "<|endoftext|>"'
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return Encoder(encode, tokenizer.bos_token_id, eos, eos if pad is None else pad)


def encode_prompt(encoder: Encoder, prompt: str) -> list[int]:
    """[bos, prompt...] with exactly one `bos`, whether or not the text already begins with it.

    Raises:
        TokenizerError: the text begins with two, or there is nothing to begin with.
    """
    tokens = encoder.encode(prompt)
    if encoder.bos is not None and tokens[:1] != [encoder.bos]:
        tokens = [encoder.bos, *tokens]
    if encoder.bos is not None and tokens[:2] == [encoder.bos, encoder.bos]:
        raise TokenizerError(
            f"prompt: begins with BOS ({encoder.bos}) twice; remove one: {prompt!r}"
        )
    if not tokens:
        raise TokenizerError("prompt: empty, and the tokenizer has no BOS; give a prompt or a BOS")
    return tokens


def encode_example(
    encoder: Encoder, prompt: str, completion: str, *, max_length: int
) -> Example | None:
    """[bos, prompt..., completion..., eos], cut at the end to `max_length` tokens.

    Prompt and completion are encoded apart, so that training sees the ids a rollout begins with.
    The mask covers the completion with its `eos`, which is written once. None where no token of
    the completion fits.
    """
    before, after = encode_prompt(encoder, prompt), encoder.encode(completion)
    if after[-1:] != [encoder.eos]:
        after = [*after, encoder.eos]
    tokens = [*before, *after][:max_length]
    if len(tokens) <= len(before):
        return None
    return Example(tokens, [i >= len(before) for i in range(len(tokens))])


def tokenise_demonstrations(
    encoder: Encoder, demonstrations: Sequence[Demonstration], *, max_length: int
) -> Tokenised[Example]:
    """Every demonstration as an example; those without room for a completion are counted."""
    _check_length(max_length)
    examples = [encode_example(encoder, *d, max_length=max_length) for d in demonstrations]
    return _fitting(examples)


def tokenise_pairs(
    encoder: Encoder, pairs: Sequence[Pair], *, max_length: int
) -> Tokenised[PairExample]:
    """Every pair as two examples; those that no longer differ, or do not fit, are counted."""
    _check_length(max_length)

    def both(pair: Pair) -> PairExample | None:
        chosen = encode_example(encoder, pair.prompt, pair.chosen, max_length=max_length)
        rejected = encode_example(encoder, pair.prompt, pair.rejected, max_length=max_length)
        if chosen is None or rejected is None or chosen == rejected:
            return None
        return PairExample(chosen, rejected)

    return _fitting([both(pair) for pair in pairs])


def tokenise_prompts(
    encoder: Encoder, prompts: Sequence[str], *, max_length: int
) -> Tokenised[list[int]]:
    """Every prompt as tokens; those longer than `max_length` are counted, and never cut."""
    _check_length(max_length)
    encoded = (encode_prompt(encoder, prompt) for prompt in prompts)
    return _fitting([tokens if len(tokens) <= max_length else None for tokens in encoded])


def pad(examples: Sequence[Example], *, side: str, pad: int, length: int | None = None) -> Padded:
    """Stack examples into tokens, attention (True = a real token) and completion mask.

    Args:
        side: "left" or "right".
        pad: the id that is written where attention is False.
        length: the width; that of the longest example where None.

    Raises:
        ValueError: no examples, another side, or an example longer than `length`.
    """
    if side not in ("left", "right"):
        raise ValueError(f'side is {side!r}, expected "left" or "right"')
    if not examples:
        raise ValueError("examples: got none, expected one or more")
    longest = max(len(e.tokens) for e in examples)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"length is {width}, but an example has {longest} tokens; cut or drop it")

    def row(values: Sequence[Any], fill: Any) -> list[Any]:
        fills = [fill] * (width - len(values))
        return [*fills, *values] if side == "left" else [*values, *fills]

    return Padded(
        torch.tensor([row(e.tokens, pad) for e in examples], dtype=torch.int64),
        torch.tensor([row([True] * len(e.tokens), False) for e in examples], dtype=torch.bool),
        torch.tensor([row(e.mask, False) for e in examples], dtype=torch.bool),
    )


def pad_prompts(
    prompts: Sequence[list[int]], *, pad: int, length: int | None = None
) -> tuple[Int64[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """Stack prompts with padding on the left, where generation needs it: (tokens, attention)."""
    tokens, attention, _ = _pad(
        [Example(p, [False] * len(p)) for p in prompts], side="left", pad=pad, length=length
    )
    return tokens, attention


def batch_indices(
    key: Int64[Tensor, " 2"], step: int, *, rows: int, batch: int
) -> Int64[Tensor, " batch"]:
    """The rows of step number `step`: a pure function of (key, step).

    Row j of step s is place i = s·batch + j of an endless stream in which every epoch ⌊i/rows⌋
    is a permutation of its own, so each row comes exactly once per epoch and no step is short.

    Raises:
        ValueError: `step` is negative, or `rows` or `batch` is below 1.
    """
    return _in_epochs(
        lambda epoch: random.permutation(random.fold_in(key, epoch), rows), step, rows, batch
    )


def bucketed_indices(
    key: Int64[Tensor, " 2"], step: int, *, lengths: Int64[Tensor, " rows"], batch: int, window: int
) -> Int64[Tensor, " batch"]:
    """`batch_indices` whose steps hold rows of similar length, and so less padding.

    The rows that `batch_indices` gives `window` steps in a row, as far as they are of one epoch,
    are sorted by length and dealt to these steps, which step gets which lengths being random.
    window = 1 is `batch_indices`; any other draws minibatches that are no uniform sample of the
    rows, though each row comes exactly once per epoch.

    Raises: as `batch_indices`; ValueError or TypeError unless `window` is an int >= 1.
    """
    checks.count(least=1, window=window)
    rows = len(lengths)

    def order(epoch: int) -> Tensor:
        shuffled = random.permutation(random.fold_in(key, epoch), rows)
        steps = (epoch * rows + torch.arange(rows)) // batch
        turns = random.bits(random.fold_in(random.fold_in(key, -1), steps))  # -1 is no epoch
        slots = _lexsort(steps // window, turns)
        dealt = torch.empty_like(slots)
        dealt[slots] = _lexsort(steps // window, lengths[shuffled])
        return shuffled[dealt[_lexsort(steps, dealt)]]

    return _in_epochs(order, step, rows, batch)


def split(
    records: Sequence[R], key: Int64[Tensor, " 2"], fraction: float
) -> tuple[list[R], list[R]]:
    """(kept, held out): about `fraction` of the distinct records are held out, drawn by `key`.

    Both keep their order. Equal records go to the same side, so none is in both.

    Raises:
        ValueError: `fraction` is outside (0, 1), or leaves a side empty.
    """
    names = [_canonical(record) for record in records]
    distinct = list(dict.fromkeys(names))
    count = round(fraction * len(distinct)) if 0 < fraction < 1 else 0
    if not 0 < count < len(distinct):
        raise ValueError(
            f"fraction is {fraction} of {len(distinct)} distinct records: expected a number in "
            "(0, 1) that leaves both sides at least one"
        )
    held = {distinct[i] for i in random.permutation(key, len(distinct))[:count].tolist()}
    kept = [record for record, name in zip(records, names) if name not in held]
    return kept, [record for record, name in zip(records, names) if name in held]


def _in_epochs(
    order: Callable[[int], Tensor], step: int, rows: int, batch: int
) -> Int64[Tensor, " batch"]:
    """Places step·batch, ..., (step + 1)·batch − 1 of the orders of all epochs, end to end."""
    if step < 0 or rows < 1 or batch < 1:
        raise ValueError(
            f"step {step}, rows {rows}, batch {batch}: expected step >= 0, rows >= 1, batch >= 1"
        )
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // rows, (last - 1) // rows + 1)
    stream = torch.cat([order(epoch) for epoch in epochs])
    return stream[first - epochs[0] * rows : last - epochs[0] * rows]


def _lexsort(major: Tensor, minor: Tensor) -> Int64[Tensor, " rows"]:
    """The order by `major`, then `minor`, then place."""
    by_minor = minor.argsort(stable=True)
    return by_minor[major[by_minor].argsort(stable=True)]


_pad = pad  # `pad_prompts` has an argument of that name


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True)


def _check_length(max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected 2 or more: a prompt and an answer")


def _fitting(examples: Sequence[R | None]) -> Tokenised[R]:
    fitting = [example for example in examples if example is not None]
    return Tokenised(fitting, len(examples) - len(fitting))
