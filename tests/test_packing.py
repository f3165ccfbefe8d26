"""Laws of packing: what stands beside a row in its packed row changes nothing for it."""

import functools
import itertools
from collections import Counter

import pytest
import tiny
import torch
import transformers as hf
from cases_steps import CLIPS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from rlhf_fn import linear_token_logprobs, losses, random
from rlhf_fn.compiled import compiled_gradient
from rlhf_fn.losses import ImitationBatch, PolicyBatch, SftBatch, next_token_logprobs
from rlhf_fn.models import causal_lm, hidden_states
from rlhf_fn.packing import first_fit_decreasing, pack
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.skeletons import attention_mask, positions
from rlhf_fn.steps import autograd_gradient, functional_gradient

KEY = random.key(0)
few = settings(max_examples=8)
some_rows = tiny.ragged(rows=4, least=0).filter(lambda rows: rows[0].shape[-1])
each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)
POLICY = CLIPS | {"temperature": 0.7, "kl_coef": 0.3, "entropy_coef": 0.05}


def batch_of(kind, rows, seed=0):
    """Fields of noise, NaN where nothing may look, and weights wherever there may be some."""
    tokens, attention = rows
    generator = torch.Generator().manual_seed(seed)
    follows = attention & torch.nn.functional.pad(attention, (1, 0))[:, :-1]
    weighs = follows & (torch.rand(tokens.shape, generator=generator) < 0.8)
    fields = {"tokens": tokens, "attention": attention}
    for name in kind._fields[2:]:
        noise = torch.rand(tokens.shape, generator=generator, dtype=torch.float64) - 2
        hidden = 0.0 if name in ("weights", "imitation") else torch.nan
        fields[name] = noise.where(weighs, hidden)
    return kind(**fields)


def ordered(batch):
    """[(tokens, *fields), ...] of each row, or segment, that has tokens: sorted."""
    rows = []
    for row in zip(*batch):
        attention = row[1].long()
        for segment in attention.unique():
            if segment:
                at = attention == segment
                rows.append(tuple(str(x[at].tolist()) for x in (row[0], *row[2:])))
    return sorted(rows)


def unpacked(per_token, segments):
    """The values of each segment, in a list."""
    pairs = zip(per_token, segments)
    return [x[row == s] for x, row in pairs for s in row.unique() if s != 0]


def by_tokens(batch, per_token):
    """Each row's values of its tokens but the first, sorted by what the row's fields are."""
    segments = batch.attention.long()
    values = unpacked(per_token, segments)
    names = [str(x.tolist()) for x in unpacked(torch.stack(batch[3:], -1), segments)]
    return torch.cat([values[i][1:] for i in sorted(range(len(names)), key=names.__getitem__)])


@each_decoder
@given(rows=tiny.ragged(rows=4), room=st.integers(0, 8))
@few
def test_logprobs_of_packed_rows_are_those_of_the_rows(family, rows, room):
    batch = batch_of(PolicyBatch, rows)
    short = pack(batch, length=int(batch.attention.sum(-1).max()) + room)
    apply, params = causal_lm(tiny.tiny(family))
    logprobs = next_token_logprobs(apply)
    one, other = (by_tokens(b, logprobs(params, *b[:2])) for b in (batch, short))
    exactly(one, other)
    assert apply(params, *short[:2]).isfinite().all()


@each_decoder
@pytest.mark.parametrize("kind", [SftBatch, PolicyBatch, ImitationBatch])
@given(rows=some_rows, room=st.integers(1, 8))
@settings(max_examples=4)
def test_losses_metrics_and_gradients_of_packed_rows_are_those_of_the_rows(
    family, kind, rows, room
):
    batch = batch_of(kind, rows)
    apply, params = causal_lm(tiny.tiny(family))
    loss = losses.sft_loss(apply) if kind is SftBatch else losses.policy_loss(apply, **POLICY)
    short = pack(batch, length=int(batch.attention.sum(-1).max()) + room)
    expected = functional_gradient(loss)(params, batch, KEY)
    for gradient in (functional_gradient, autograd_gradient):
        exactly(gradient(loss)(params, short, KEY), expected)


@each_decoder
def test_what_a_neighbour_says_changes_no_bit_of_a_segment(family):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, tiny.VOCAB, (2, 9), generator=generator)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 2, 3, 3, 3, 3, 3, 3]])
    apply, params = causal_lm(tiny.tiny(family))
    logits = apply(params, tokens, segments)
    for mine in (1, 2, 3):
        other = tiny.garbage(tokens, segments == mine)
        assert not other.equal(tokens)
        found = apply(params, other, segments)
        assert found[segments == mine].equal(logits[segments == mine])
        assert not found.equal(logits)


@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=3))
def test_a_token_reads_its_own_segment_up_to_itself_and_counts_from_its_start(rows):
    segments = torch.tensor([sorted(row) + [0] * (9 - len(row)) for row in rows])
    place = positions(segments)
    for causal in (True, False):
        reads = attention_mask(segments, causal=causal)
        for b, q, k in itertools.product(range(len(rows)), range(9), range(9)):
            same = segments[b, q] == segments[b, k] != 0
            assert reads[b, 0, q, k] == (q == k or (same and (k < q or not causal)))
    before = attention_mask(segments, causal=True)[:, 0].sum(-1) - 1
    assert place[segments != 0].equal(before[segments != 0]) and (place >= 0).all()


lengths_and_room = st.integers(1, 12).flatmap(
    lambda room: st.tuples(st.lists(st.integers(0, room), max_size=8), st.just(room))
)


def fewest(lengths, room):
    """The fewest rows that hold `lengths`, by trying: after any set, (rows, filled of the last)."""
    best = {0: (1, 0)}
    for chosen in range(1, 1 << len(lengths)):
        ways = []
        for i, n in enumerate(lengths):
            if chosen >> i & 1:
                rows, used = best[chosen ^ 1 << i]
                ways.append((rows, used + n) if used + n <= room else (rows + 1, n))
        best[chosen] = min(ways)
    return best[(1 << len(lengths)) - 1][0] if lengths else 0


@given(lengths_and_room)
def test_first_fit_decreasing_splits_nothing_and_wastes_little(drawn):
    lengths, room = drawn
    places = first_fit_decreasing(lengths, room)
    used, numbers = Counter(), Counter()
    for (row, start, number), n in sorted(zip(places, lengths)):
        assert (start, number) == (used[row], numbers[row] + 1)
        used[row] += n
        numbers[row] = number
    assert max(used.values(), default=0) <= room
    rows = len(used)
    assert sorted(used) == list(range(rows)) and rows <= len(lengths)
    assert all(used[a] + used[b] > room for a, b in itertools.combinations(used, 2))
    assert 9 * rows <= 11 * fewest(lengths, room) + 6
    assert places == first_fit_decreasing(list(lengths), room)


def test_the_longest_row_goes_first_and_each_where_it_first_fits():
    places = [(2, 3, 2), (0, 0, 1), (2, 0, 1), (1, 0, 1), (0, 5, 2)]
    assert first_fit_decreasing([2, 5, 3, 5, 1], 6) == places


@given(tiny.ragged(rows=5, least=0), st.integers(0, 8))
def test_packing_moves_every_field_with_its_token_and_never_makes_more_rows(rows, room):
    batch = batch_of(ImitationBatch, rows)
    length = max(1, int(batch.attention.sum(-1).max())) + room
    short = pack(batch, length=length)
    assert isinstance(short, ImitationBatch) and ordered(short) == ordered(batch)
    assert short.tokens.shape[0] <= batch.tokens.shape[0] and short.tokens.shape[1] == length
    assert [x.dtype for x in short[2:]] == [x.dtype for x in batch[2:]]
    for name in ("weights", "imitation"):
        weights = getattr(short, name)
        before = torch.nn.functional.pad(short.attention, (1, 0))[:, :-1]
        starts = (short.attention != before) | (short.attention == 0)
        assert not weights[starts].any()
        assert weights.sum() == pytest.approx(float(getattr(batch, name).sum()))
    for row in short.attention:
        numbers = [s for s, _ in itertools.groupby(row.tolist())]
        filled = [s for s in numbers if s]
        assert numbers[: len(filled)] == filled == list(range(1, len(filled) + 1))


def test_rows_of_padding_alone_are_one_row():
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    batch = SftBatch(torch.ones(3, 4, dtype=torch.int64), nothing, torch.zeros(3, 4))
    assert not pack(batch, length=5).attention.any()
    assert pack(batch, length=5).tokens.shape == (1, 5)
    assert pack(SftBatch(*(x[:0] for x in batch)), length=5).tokens.shape == (0, 5)


def test_what_cannot_be_packed_is_refused_by_name():
    attention = torch.tensor([[False, True, True, True], [True, True, False, False]])
    rows = torch.zeros(2, 4, dtype=torch.int64), attention
    batch = batch_of(ImitationBatch, rows)
    with pytest.raises(ValueError, match="length is 2, but row 0 has 3 tokens"):
        pack(batch, length=2)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        pack(batch, length=0)
    with pytest.raises(TypeError, match="attention must be torch.bool"):
        pack(pack(batch, length=5), length=9)
    with pytest.raises(ValueError, match=r"weights \(2,\)"):
        pack(batch._replace(weights=torch.zeros(2)), length=4)
    unpredicted = (0, 0), (0, 1), (1, 0), (1, 2)
    for name, (row, t) in itertools.product(["weights", "imitation"], unpredicted):
        weights = getattr(batch, name).clone()
        weights[row, t] = -0.5
        with pytest.raises(ValueError, match=rf"{name}\[{row}, {t}\] is -0.5.*expected 0"):
            pack(batch._replace(**{name: weights}), length=4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_packed_row_may_be_longer_than_its_model_reads_but_no_segment(family):
    apply, params = causal_lm(tiny.tiny(family))
    tokens = torch.arange(2 * tiny.LONGEST + 1)[None] % tiny.VOCAB
    segments = (torch.arange(2 * tiny.LONGEST + 1)[None] + tiny.LONGEST) // tiny.LONGEST
    segments[0, -1] = 0
    found = apply(params, tokens, segments)
    for mine in (segments == 1, segments == 2):
        exactly(found[mine], apply(params, tokens[mine], tiny.whole(tokens[mine])))
    segments[0, -1] = 2
    with pytest.raises(ValueError, match=f"a row of {tiny.LONGEST + 1}.*at most {tiny.LONGEST}"):
        apply(params, tokens, segments)


def test_a_sliding_window_slides_over_no_segment():
    config = hf.MistralConfig(**tiny.WIDE, num_key_value_heads=2, sliding_window=4)
    module = tiny.seeded(lambda: hf.MistralForCausalLM(config)).eval()
    apply, params = causal_lm(module)
    tokens = torch.arange(10)[None]
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 3, 3, 3]])
    found = apply(params, tokens, segments)
    for s in (1, 2, 3):
        alone = tokens[segments == s]
        exactly(found[segments == s], module(alone[None]).logits[0])
    with pytest.raises(ValueError, match="window"):
        apply(params, tokens, segments.clamp(max=2))


@given(rows=tiny.ragged(rows=4), room=st.integers(1, 8))
@few
def test_an_encoder_sees_both_ways_within_a_segment(rows, room):
    batch = batch_of(PolicyBatch, rows)
    short = pack(batch, length=int(batch.attention.sum(-1).max()) + room)
    apply, params = hidden_states(tiny.tiny("bert"))
    states, rows = (unpacked(x, short[1]) for x in (apply(params, *short[:2]), short[0]))
    for found, tokens in zip(states, rows):
        exactly(found, apply(params, tokens, tiny.whole(tokens)))


def ragged_batch(kind):
    """Rows of 6, 1, 4, 2, 3 and 6 tokens, padded left, right and on both sides."""
    step, lengths, starts = torch.arange(6), (6, 1, 4, 2, 3, 6), (0, 2, 2, 0, 1, 0)
    attention = torch.stack([(step >= s) & (step < s + n) for s, n in zip(starts, lengths)])
    tokens = torch.arange(36).reshape(6, 6) * 7 % tiny.VOCAB
    return batch_of(kind, (tokens, attention))


def test_packed_rows_need_no_logits():
    apply, params = projected_lm(tiny.tiny("llama"))
    loss = losses.sft_loss(apply, token_logprobs=of_projection(linear_token_logprobs))
    batch = ragged_batch(SftBatch)
    expected = functional_gradient(loss)(params, batch, KEY)
    exactly(functional_gradient(loss)(params, pack(batch, length=8), KEY), expected)


@each_decoder
def test_packed_rows_and_populations_are_computed_by_vmap(family):
    apply, params = causal_lm(tiny.tiny(family))
    loss = losses.sft_loss(apply)
    batch = pack(ragged_batch(SftBatch), length=8)
    slope = grad(lambda p, *fields: loss(p, SftBatch(*fields), KEY)[0])
    each = vmap(slope, in_dims=(None, 0, 0, 0))(params, *batch)
    exactly({name: x.sum(0) for name, x in each.items()}, slope(params, *batch))
    two = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}
    halved = {name: 0.5 * p for name, p in params.items()}
    expected = torch.stack([apply(p, *batch[:2]) for p in (params, halved)])
    exactly(vmap(lambda p: apply(p, *batch[:2]))(two), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.compile
def test_one_graph_takes_any_number_of_packed_rows(backend):
    apply, params = causal_lm(tiny.tiny("llama"))
    loss = losses.policy_loss(apply, **POLICY)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compiled_gradient(loss, rows=4, time=12, backend=backend)
    batch = ragged_batch(PolicyBatch)
    for length in (8, 10, 12):
        short = pack(batch, length=length)
        expected = autograd_gradient(loss)(params, short, KEY)
        torch.testing.assert_close(compiled(params, short, KEY), expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
