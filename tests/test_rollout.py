"""Sampling: what is drawn, from what, and what is said of it."""

import pytest
import torch
from cases_rollout import (
    DECODER,
    KEYS,
    PAD,
    POLICY,
    PROMPT,
    STOP,
    VOCAB,
    draw,
    padded,
    scripted,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fn import random
from rlhf_fn.decoding import Decoder
from rlhf_fn.losses import next_token_logprobs
from rlhf_fn.rollout import Prompts, Rollout, completions, sample, sampling_logits

# what the policy says (stop = 2) -> how many of it count
TRUTH = {
    "no stop": ([5, 6, 7, 8], 4),
    "one stop": ([5, 2, 7, 8], 2),
    "two stops": ([5, 2, 7, 2], 2),
    "stop first": ([2, 6, 7, 8], 1),
    "stop last": ([5, 6, 7, 2], 4),
    "pad inside": ([5, 0, 7, 2], 4),
    "two stops in a row": ([5, 2, 2, 8], 2),
}


@pytest.mark.parametrize("pad", [PAD, STOP])
@pytest.mark.parametrize("said, kept", TRUTH.values(), ids=TRUTH)
@pytest.mark.parametrize("other", [[3, 3, 3, 3], [2, 3, 3, 3]], ids=["beside long", "beside short"])
def test_the_mask_ends_with_the_first_stop(said, kept, other, pad):
    prompts = padded([[5, 6, 7], [8]], 3)
    options = {"max_new_tokens": 4, "temperature": 1.0, "stop": [STOP], "pad": pad}
    rollout = sample(scripted([said, other]), {}, prompts, KEYS, **options)
    assert rollout.tokens[0].tolist() == [5, 6, 7] + said[:kept] + [pad] * (4 - kept)
    assert rollout.mask[0].tolist() == [False] * 3 + [True] * kept + [False] * (4 - kept)
    assert rollout.attention[0].tolist() == [True] * (3 + kept) + [False] * (4 - kept)
    assert rollout.attention[1, :3].tolist() == [False, False, True]
    assert completions(rollout)[0] == said[:kept]
    assert rollout.logprobs.eq(0).all() and rollout.tokens.shape == (2, 7)


def test_every_stop_stops_and_no_stop_at_all_never_does():
    options = {"max_new_tokens": 3, "temperature": 1.0, "pad": PAD}
    said = scripted([[5, 3, 6], [2, 5, 6]])
    both = sample(said, {}, PROMPT, KEYS, stop=[STOP, 3], **options)
    none = sample(said, {}, PROMPT, KEYS, stop=[], **options)
    assert completions(both) == [[5, 3], [2]]
    assert completions(none) == [[5, 3, 6], [2, 5, 6]]


prompts_of = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=2, max_size=4
)


@settings(max_examples=15)
@given(prompts_of, st.integers(0, 4), st.integers(0, 2**32), st.sampled_from([0.7, 1.0, 1.3]))
def test_a_row_does_not_depend_on_its_batch_or_its_padding(rows, extra, seed, temperature):
    width = max(len(row) for row in rows) + extra
    keys = random.split(random.key(seed), len(rows))
    together = draw(padded(rows, width), keys, temperature=temperature)
    for i, row in enumerate(rows):
        alone = draw(padded([row], len(row)), keys[i : i + 1], temperature=temperature)
        assert completions(alone)[0] == completions(together)[i]
        torch.testing.assert_close(
            together.logprobs[i][together.mask[i]], alone.logprobs[alone.mask]
        )


def test_a_token_depends_on_its_row_key_and_step_alone():
    tall = padded([[5, 6]] * 3, 2)
    keys = random.split(random.key(3), 3)
    first = draw(tall, keys, stop=[])
    turned = draw(tall, keys.flip(0), stop=[])
    longer = draw(tall, keys, stop=[], max_new_tokens=9)
    assert torch.equal(first.tokens.flip(0), turned.tokens)
    assert torch.equal(first.tokens, longer.tokens[:, :8])
    assert len({tuple(row) for row in first.tokens.tolist()}) == 3


SUPPORTS = [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.7}]


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_a_full_forward(temperature, support):
    prompts = padded([[5, 6, 7, 1], [8], [3, 3]], 5)
    keys = random.split(random.key(4), 3)
    rollout = draw(prompts, keys, temperature=temperature, stop=range(6), **support)
    assert len(set(rollout.mask.sum(-1).tolist())) > 1  # one row stops before another
    logits = POLICY.apply(POLICY.params, rollout.tokens, rollout.attention)
    for i, t in rollout.mask.nonzero().tolist():
        z = sampling_logits(logits[i, t - 1], temperature=temperature, **support)
        expected = z.log_softmax(-1)[rollout.tokens[i, t]]
        torch.testing.assert_close(rollout.logprobs[i, t], expected)
    if not support:
        forward = next_token_logprobs(POLICY.apply, temperature=temperature)
        full = forward(POLICY.params, rollout.tokens, rollout.attention)
        torch.testing.assert_close(rollout.logprobs, torch.where(rollout.mask, full, 0.0))
    assert (rollout.logprobs[~rollout.mask] == 0).all()


@given(
    st.lists(st.integers(-4, 4), min_size=2, max_size=9),
    st.integers(1, 10) | st.none(),
    st.floats(0.01, 1.0) | st.none(),
    st.floats(0.2, 3.0),
)
def test_the_support_is_the_fewest_likeliest_tokens_that_hold_the_mass(
    z, top_k, top_p, temperature
):
    z = torch.tensor(z, dtype=torch.float64)
    got = sampling_logits(z, temperature=temperature, top_k=top_k, top_p=top_p)
    kept = got > -torch.inf
    probs = (z / temperature).softmax(-1)
    order = probs.argsort(descending=True, stable=True)[: top_k or len(z)].tolist()
    within, held, wanted = probs[order].sum(), 0.0, 0
    for i in order:
        if top_p is not None and top_p < 1 and held >= top_p - 1e-12:
            break
        held, wanted = held + (probs[i] / within).item(), wanted + 1
    assert kept.sum() == wanted
    if not kept.all():
        assert probs[kept].min() >= probs[~kept].max()
    expected = torch.where(kept, probs, 0.0) / probs[kept].sum()
    torch.testing.assert_close(got.softmax(-1), expected)


def test_a_top_p_of_one_keeps_every_token_however_rare():
    z = torch.tensor([0.0, -80.0])
    for top_k in (None, 2):
        assert sampling_logits(z, temperature=1.0, top_k=top_k, top_p=1.0)[1] == -80


def test_sampling_logits_never_write_to_the_logits():
    z = torch.randn(3, VOCAB)
    before = z.clone()
    sampling_logits(z, temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-308}, {"temperature": 1e-4}, {"top_k": 1}], ids=str
)
def test_the_limits_of_temperature_and_top_k_are_greedy(options):
    prompts = padded([[5, 6, 7], [8], [3, 1]], 3)
    rollout = draw(prompts, random.split(random.key(5), 3), stop=[], **options)
    logits = POLICY.apply(POLICY.params, rollout.tokens, rollout.attention)
    assert torch.equal(logits.argmax(-1)[:, 2:-1], rollout.tokens[:, 3:])
    assert rollout.logprobs.abs().max() < 1e-12


@pytest.mark.parametrize("support", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_first_tokens_are_distributed_as_the_softmax(support):
    rows, temperature = 4000, 0.8
    prompts = padded([[5, 6, 7]] * rows, 3)
    keys = random.split(random.key(6), rows)
    rollout = draw(prompts, keys, max_new_tokens=1, temperature=temperature, **support)
    logits = POLICY.apply(POLICY.params, prompts.tokens[:1], prompts.attention[:1])[0, -1]
    probs = sampling_logits(logits, temperature=temperature, **support).softmax(-1)
    counts = torch.bincount(rollout.tokens[:, -1], minlength=VOCAB).double()
    assert (counts[probs == 0] == 0).all()
    enough = probs * rows >= 5
    chi2 = ((counts - rows * probs).square() / (rows * probs))[enough].sum()
    freedom = int(enough.sum()) - 1
    assert freedom >= 3
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations; the key is fixed


def test_sampling_leaves_its_arguments_untouched_and_carries_no_graph():
    prompts, keys = padded([[5, 6], [8]], 3), KEYS.clone()
    params = {name: p.clone().requires_grad_() for name, p in POLICY.params.items()}
    before = [x.detach().clone() for x in (*prompts, keys, *params.values())]
    logits = POLICY.apply(params, *prompts)[:, -1]
    differentiable = Decoder(lambda *_: (logits, None), lambda *_: (logits, None))
    options = {"max_new_tokens": 3, "temperature": 1.0, "stop": [], "pad": PAD}
    for model in (DECODER, differentiable):
        rollout = sample(model, params, prompts, keys, **options)
        assert isinstance(rollout, Rollout) and not any(x.requires_grad for x in rollout)
    after = [x.detach() for x in (*prompts, keys, *params.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


def test_sampling_stops_reading_once_every_row_has_stopped():
    said = scripted([[5, 2, 7, 8], [2, 6, 7, 8]])
    reads = []

    def decode(*arguments):
        reads.append(arguments[3])
        return said.decode(*arguments)

    options = {"max_new_tokens": 4, "temperature": 1.0, "stop": [STOP], "pad": PAD}
    rollout = sample(Decoder(said.prefill, decode), {}, PROMPT, KEYS, **options)
    assert reads == [3] and rollout.tokens.shape == (2, 7)


def test_rows_that_have_stopped_are_read_no_more_once_they_are_half():
    said = scripted([[5, 2, 7, 8], [2, 6, 7, 8], [5, 6, 7, 8], [5, 6, 2, 8], [2, 6, 7, 8]])
    read = []

    def decode(params, tokens, *more):
        read.append(tokens.tolist())
        return said.decode(params, tokens, *more)

    prompts, keys = padded([[5]] * 5, 1), random.split(random.key(1), 5)
    options = {"max_new_tokens": 4, "temperature": 1.0, "stop": [STOP], "pad": PAD}
    rollout = sample(Decoder(said.prefill, decode), {}, prompts, keys, **options)
    assert read == [[5, 2, 5, 5, 2], [6, 6], [7]]
    assert completions(rollout) == [[5, 2], [2], [5, 6, 7, 8], [5, 6, 2], [2]]


@settings(max_examples=15)
@given(prompts_of, st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([0.7, 1.3]))
def test_a_prompt_that_is_answered_often_is_read_once(rows, group, seed, temperature):
    prompts = padded(rows, max(len(row) for row in rows))
    keys = random.split(random.key(seed), len(rows) * group)
    sizes = []

    def prefill(params, tokens, *more):
        sizes.append(len(tokens))
        return DECODER.prefill(params, tokens, *more)

    options = {"max_new_tokens": 5, "stop": [STOP], "pad": PAD}
    heat = torch.linspace(temperature, 1.0, len(keys), dtype=torch.float64)[:, None]
    once = sample(
        DECODER._replace(prefill=prefill), POLICY.params, prompts, keys, temperature=heat, **options
    )
    repeated = Prompts(*(x.repeat_interleave(group, 0) for x in prompts))
    often = sample(DECODER, POLICY.params, repeated, keys, temperature=heat, **options)
    assert sizes == [len(rows)]
    torch.testing.assert_close(once, often)
