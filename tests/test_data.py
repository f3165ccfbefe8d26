"""Laws of tokens, masks, padding and the order of the rows."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf_fn import data, random, readers
from rlhf_fn.data import Encoder, Example, Tokenised
from rlhf_fn.errors import TokenizerError
from rlhf_fn.readers import Demonstration, Pair

DATA = Path(__file__).parents[1] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no data at {DATA}")

BOS, EOS = 1, 2
letters = st.text("abcdef", max_size=12)


def encode(text: str) -> list[int]:
    """One token a character; '<' and '>' are BOS and EOS."""
    return [{"<": BOS, ">": EOS}.get(c, ord(c)) for c in text]


encoders = st.sampled_from([Encoder(encode, BOS, EOS, p) for p in (0, EOS)])
examples = st.lists(
    st.lists(st.tuples(st.sampled_from([0, BOS, EOS, 7]), st.booleans()), min_size=1, max_size=6)
    .map(lambda row: Example([t for t, _ in row], [m for _, m in row])),
    min_size=1, max_size=5,
)  # fmt: skip


def hf(**ids):
    tokenizer = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    tokenizer.encode = lambda text, *, add_special_tokens: [BOS] * add_special_tokens + encode(text)
    tokenizer.__dict__.update(ids)
    return tokenizer


@given(encoders, letters, letters, st.booleans(), st.booleans(), st.integers(2, 30))
def test_an_example_is_bos_prompt_completion_eos_cut_at_the_end(
    encoder, prompt, completion, begun, ended, max_length
):
    written = "<" * begun + prompt, completion + ">" * ended
    example = data.encode_example(encoder, *written, max_length=max_length)
    whole = [BOS, *encode(prompt), *encode(completion), EOS]
    start = 1 + len(prompt)
    if start >= max_length:
        assert example is None
        return
    assert example is not None
    assert example.tokens == whole[:max_length]
    assert example.mask == [i >= start for i in range(len(example.tokens))]
    assert any(example.mask) and not example.mask[0]
    assert example.tokens.count(BOS) == 1
    assert example.tokens.count(EOS) == (len(whole) <= max_length)


@given(encoders, st.lists(st.tuples(letters, letters, letters)), st.integers(2, 20))
def test_what_does_not_fit_is_counted_and_the_rest_keeps_its_order(encoder, rows, max_length):
    shown = [Demonstration(p, c) for p, c, _ in rows]
    each = [data.encode_example(encoder, *d, max_length=max_length) for d in shown]
    fitting = [e for e in each if e is not None]
    both = data.tokenise_demonstrations(encoder, shown, max_length=max_length)
    assert both == Tokenised(fitting, len(rows) - len(fitting))

    pairs = [Pair(*row) for row in rows]
    tokenised = data.tokenise_pairs(encoder, pairs, max_length=max_length)
    found = tokenised.examples
    assert len(found) + tokenised.dropped == len(rows)
    assert all(p.chosen != p.rejected and any(p.chosen.mask) for p in found)
    room = [p for p in pairs if len(p.prompt) + 1 < max_length]
    same = sum(
        (p.chosen + ">")[: max_length - len(p.prompt) - 1]
        == (p.rejected + ">")[: max_length - len(p.prompt) - 1]
        for p in room
    )
    assert len(found) == len(room) - same

    asked = [p for p, _, _ in rows]
    read = data.tokenise_prompts(encoder, asked, max_length=max_length)
    assert read.examples == [[BOS, *encode(p)] for p in asked if len(p) < max_length]
    assert read.dropped == len(rows) - len(read.examples)


def test_two_bos_or_nothing_to_begin_with_is_a_tokenizer_error():
    encoder = Encoder(encode, BOS, EOS, EOS)
    with pytest.raises(TokenizerError, match="BOS .1. twice; remove one"):
        data.encode_prompt(encoder, "<<a")
    bare = encoder._replace(bos=None)
    assert data.encode_prompt(bare, "ab") == encode("ab")
    with pytest.raises(TokenizerError, match="empty.*no BOS; give"):
        data.encode_example(bare, "", "answer", max_length=9)


def test_a_tokenizer_needs_eos_and_nothing_else():
    with pytest.raises(TokenizerError, match='no EOS.*tokenizer.eos_token = "'):
        data.encoder(hf(eos_token_id=None))
    assert data.encoder(hf(pad_token_id=None))[1:] == (BOS, EOS, EOS)
    assert data.encoder(hf(eos_token_id=0, pad_token_id=5))[1:] == (BOS, 0, 5)
    assert data.encoder(hf(bos_token_id=None)).bos is None
    assert data.encoder(hf()).encode("ab") == encode("ab")


def test_lengths_without_room_raise():
    encoder = data.encoder(hf())
    for tokenise in (data.tokenise_demonstrations, data.tokenise_pairs, data.tokenise_prompts):
        with pytest.raises(ValueError, match="max_length is 1, expected 2"):
            tokenise(encoder, [], max_length=1)


@given(examples, st.sampled_from(["left", "right"]), st.sampled_from([0, EOS]), st.integers(0, 3))
def test_padding_is_undone_by_attention_whatever_the_pad_id(rows, side, pad, extra):
    width = max(len(e.tokens) for e in rows) + extra
    tokens, attention, mask = data.pad(rows, side=side, pad=pad, length=width)
    assert tokens.shape == attention.shape == mask.shape == (len(rows), width)
    assert (tokens.dtype, attention.dtype, mask.dtype) == (torch.int64, torch.bool, torch.bool)
    for i, row in enumerate(rows):
        assert tokens[i][attention[i]].tolist() == row.tokens
        assert mask[i][attention[i]].tolist() == row.mask
        real = attention[i].tolist()
        assert real == sorted(real, reverse=side == "right")
    assert (tokens[~attention] == pad).all() and not mask[~attention].any()
    assert data.pad(rows, side=side, pad=pad).tokens.shape[1] == width - extra


@given(examples)
def test_prompts_are_padded_on_the_left(rows):
    tokens, attention = data.pad_prompts([e.tokens for e in rows], pad=0)
    assert attention[:, -1].all()
    expected = data.pad(rows, side="left", pad=0)
    assert torch.equal(tokens, expected.tokens) and torch.equal(attention, expected.attention)


def test_padding_refuses_what_it_cannot_do():
    rows = [Example([1, 2, 3], [False, True, True])]
    for options, message in (
        ({"side": "top"}, "side is 'top', expected \"left\""),
        ({"side": "left", "length": 2}, "length is 2, but an example has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            data.pad(rows, pad=0, **options)
    with pytest.raises(ValueError, match="examples: got none"):
        data.pad([], side="left", pad=0)


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 12), st.integers(1, 4))
def test_every_row_comes_exactly_once_in_every_epoch(seed, rows, batch, epochs):
    key = random.key(seed)
    steps = -(-rows * epochs // batch)
    parts = [data.batch_indices(key, s, rows=rows, batch=batch) for s in range(steps)]
    assert all(part.shape == (batch,) for part in parts)
    stream = torch.cat(parts).tolist()
    for e in range(epochs):
        assert Counter(stream[e * rows : (e + 1) * rows]) == Counter(range(rows))


@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 6))
def test_the_rows_are_a_function_of_key_and_step_and_not_of_the_batch_size(seed, start, batch):
    key = random.key(seed)
    rows = data.batch_indices(key, start, rows=7, batch=batch)
    one = [data.batch_indices(key, start * batch + j, rows=7, batch=1) for j in range(batch)]
    torch.manual_seed(seed % 1000)
    assert torch.equal(rows, torch.cat(one))
    assert torch.equal(rows, data.batch_indices(key.clone(), start, rows=7, batch=batch))


def test_epochs_and_keys_have_orders_of_their_own():
    orders = [
        data.batch_indices(random.key(k), e, rows=50, batch=50) for k in (0, 1) for e in (0, 1)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for bad in ({"step": -1}, {"rows": 0}, {"batch": 0}):
        step, rows, batch = (bad.get(name, 1) for name in ("step", "rows", "batch"))
        with pytest.raises(ValueError, match="expected step >= 0, rows >= 1, batch >= 1"):
            data.batch_indices(random.key(0), step, rows=rows, batch=batch)


@st.composite
def bucketed(draw, multiple=False):
    """A key, lengths, a batch size and a window; and the rows of every step of some epochs."""
    key, batch = random.key(draw(st.integers(0, 2**32))), draw(st.integers(1, 5))
    lengths = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=1, max_size=20)))
    lengths = lengths.repeat(batch) if multiple else lengths
    window, epochs = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    steps = -(-epochs * len(lengths) // batch)
    options = {"lengths": lengths, "batch": batch, "window": window}
    parts = [data.bucketed_indices(key, s, **options) for s in range(steps)]
    return key, options, parts


@given(bucketed())
def test_every_row_comes_exactly_once_in_every_epoch_of_buckets(drawn):
    key, options, parts = drawn
    rows, batch = len(options["lengths"]), options["batch"]
    assert all(part.shape == (batch,) for part in parts)
    stream = torch.cat(parts).tolist()
    for start in range(0, len(stream) - rows + 1, rows):
        assert Counter(stream[start : start + rows]) == Counter(range(rows))
    torch.manual_seed(len(parts))
    again = data.bucketed_indices(key.clone(), len(parts) - 1, **options)
    assert again.equal(parts[-1])
    plain = data.batch_indices(key, len(parts) - 1, rows=rows, batch=batch)
    assert plain.equal(data.bucketed_indices(key, len(parts) - 1, **options | {"window": 1}))


@given(bucketed())
def test_the_steps_of_a_window_share_the_rows_of_an_epoch_out_by_length(drawn):
    """No two of them have lengths on both sides of the other's, ragged or not."""
    _, options, parts = drawn
    lengths, batch, window = options.values()
    shares = {}
    for place, row in enumerate(torch.cat(parts).tolist()):
        epoch, step = place // len(lengths), place // batch
        shares.setdefault((epoch, step // window), {}).setdefault(step, []).append(lengths[row])
    for steps in shares.values():
        for one, other in itertools.combinations(steps.values(), 2):
            assert max(one) <= min(other) or max(other) <= min(one)


@given(bucketed(multiple=True))
def test_buckets_never_pad_an_epoch_of_whole_steps_by_more_than_its_plain_order(drawn):
    key, options, parts = drawn
    lengths, batch, _ = options.values()
    plain = [data.batch_indices(key, s, rows=len(lengths), batch=batch) for s in range(len(parts))]
    steps = len(lengths) // batch
    for epoch in range(0, len(parts), steps):
        one, other = (sum(lengths[rows].max() for rows in order[epoch : epoch + steps])
                      for order in (parts, plain))  # fmt: skip
        assert one <= other


def test_the_order_of_buckets_is_random_and_of_the_key_and_the_epoch():
    lengths = torch.arange(40)
    options = {"lengths": lengths, "batch": 4, "window": 10}
    turns = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        steps = range(10 * epoch, 10 * epoch + 10)
        parts = [data.bucketed_indices(random.key(seed), s, **options) for s in steps]
        assert [sorted(p.tolist()) for p in sorted(parts, key=min)] == lengths.view(10, 4).tolist()
        turns.add(tuple(int(p.min()) for p in parts))
    assert len(turns) == 9 and tuple(range(0, 40, 4)) not in turns
    for bad, message in (({"window": 0}, "window must be"), ({"lengths": lengths[:0]}, "rows 0")):
        with pytest.raises(ValueError, match=message):
            data.bucketed_indices(random.key(0), 0, **options | bad)


@given(st.lists(letters, min_size=1), st.integers(0, 99), st.floats(0.01, 0.99))
def test_no_record_is_held_out_and_kept(names, seed, fraction):
    records = [Demonstration(name, "a") for name in names]
    distinct = len(set(names))
    assume(0 < round(fraction * distinct) < distinct)
    kept, held = data.split(records, random.key(seed), fraction)
    assert not set(kept) & set(held)
    assert len(set(held)) == round(fraction * distinct)
    assert kept == [r for r in records if r in set(kept)]
    assert held == [r for r in records if r in set(held)]
    assert (kept, held) == data.split(records, random.key(seed), fraction)


def test_the_held_out_records_are_drawn_by_the_key_and_leave_no_side_empty():
    records = list(range(100))
    draws = {tuple(data.split(records, random.key(seed), 0.2)[1]) for seed in range(5)}
    assert len(draws) == 5
    for fraction in (0.0, 1.0, -0.5, 1.5, 1e-9, float("nan")):
        with pytest.raises(ValueError, match="fraction is"):
            data.split(records, random.key(0), fraction)


@needs_data
@pytest.mark.parametrize("name", ["models/stories260K", "models/tinystories-gpt2-byte-1M",
                                  "tokenizers/gpt2", "tokenizers/minimind-6400"])  # fmt: skip
def test_real_tokenizers_frame_every_text_once(name):
    from transformers import AutoTokenizer

    encoder = data.encoder(AutoTokenizer.from_pretrained(DATA / name))
    path = DATA / "preference/hh-rlhf-harmless.jsonl.gz"
    pairs = readers.read_pairs(path, on_bad="skip").records[:50]
    tokenised = data.tokenise_pairs(encoder, pairs, max_length=4096)
    assert (len(tokenised.examples), tokenised.dropped) == (50, 0)
    for pair in tokenised.examples:
        for tokens, mask in pair:
            assert tokens[0] == encoder.bos and tokens[-1] == encoder.eos and mask[-1]
            assert encoder.eos not in tokens[1:-1] and encoder.bos not in tokens[1:-1]
        prompts = [[t for t, m in zip(*e) if not m] for e in pair]
        assert prompts[0] == prompts[1]
