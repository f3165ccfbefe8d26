"""A prompt that rows share is read once: losses and gradients are those of whole rows."""

import math
from functools import partial

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fused import peak

from rlhf_fn import batches, logprobs, prefix, random, recipes, weights
from rlhf_fn.compiled import compiled_gradient
from rlhf_fn.heads import classifier, last_token, mean_pool, reward_model
from rlhf_fn.losses import PolicyBatch, SftBatch, next_token_logprobs
from rlhf_fn.models import causal_lm
from rlhf_fn.pair_losses import DpoBatch, PairBatch, reward_loss
from rlhf_fn.precision import in_dtype
from rlhf_fn.prefix import Prefixed
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.recompute import checkpointed
from rlhf_fn.steps import autograd_gradient, functional_gradient, of_asked, of_shared

KEY = random.key(0)


def answered(prompts, group, prompt=5, answer=4, seed=0):
    """Tokens and attention of prompts of 0, 1, … tokens on the left, and ragged answers to each."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, tiny.VOCAB, (prompts, prompt), generator=draw)
    lengths = torch.arange(prompts)[:, None] % (prompt + 1)
    real = torch.arange(prompt) >= prompt - lengths
    tokens = torch.where(real, tokens, 0).repeat_interleave(group, 0)
    answers = torch.randint(3, tiny.VOCAB, (prompts * group, answer), generator=draw)
    until = torch.randint(answer + 1, (prompts * group, 1), generator=draw)
    until[0] = answer
    there = torch.arange(answer) < until
    attention = torch.cat([real.repeat_interleave(group, 0), there], -1)
    return torch.cat([tokens, torch.where(there, answers, 0)], -1), attention


def policy_batch(tokens, attention, prompt=5):
    mask = attention & (torch.arange(tokens.shape[1]) >= prompt)
    values = torch.randn(3, *tokens.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    return PolicyBatch(tokens, attention, *values, weights.token_mean(mask).double())


def of_policy(apply, **more):
    return recipes.grpo.loss(apply, **more)


def assert_same(loss, params, batch, rtol=1e-5, atol=1e-7):  # where norms are float32
    """The loss, its metrics and its gradient, by whole rows and by prompts and answers."""
    assert isinstance(prefix.shared(batches.asked(batch)).tokens, Prefixed)
    whole, once = (
        gradient(loss)(params, batch, KEY)
        for gradient in (autograd_gradient, of_asked(of_shared(autograd_gradient)))
    )
    torch.testing.assert_close(once, whole, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("prompts, group", [(1, 2), (3, 2), (2, 4)])
def test_every_decoder_has_the_same_loss_and_gradient(family, prompts, group):
    apply, params = causal_lm(tiny.tiny(family))
    batch = policy_batch(*answered(prompts, group))
    exact = {"rtol": 1e-10, "atol": 1e-12} if family in ("gpt2", "neox", "opt") else {}
    assert_same(of_policy(apply), params, batch, **exact)


def test_no_model_reads_a_shared_prompt_twice():
    read = []
    apply, params = causal_lm(tiny.tiny("llama"))

    def counting(params, tokens, attention):
        read.append(sum(x.numel() for x in tokens) if isinstance(tokens, Prefixed) else None)
        return apply(params, tokens, attention)

    gradient = of_asked(of_shared(autograd_gradient))(of_policy(counting))
    gradient(params, policy_batch(*answered(3, 4)), KEY)
    assert read == [3 * 5 + 12 * 4]


def test_a_projection_has_the_same_loss_and_gradient():
    apply, params = projected_lm(tiny.tiny("qwen2"))  # whose head is its embedding

    def statistics(hidden, weight, tokens, bias, temperature):
        logits = hidden @ weight.mT
        return logprobs.token_logprobs(logits, tokens, temperature=temperature), logprobs.entropy(
            logits, temperature=temperature
        )

    loss = of_policy(apply, token_logprobs=of_projection(statistics))
    assert_same(loss, params, policy_batch(*answered(3, 3)))


@pytest.mark.parametrize("answers", [2, 4])
def test_pairs_and_what_is_measured_beside_them_have_the_same_loss_and_gradient(answers):
    apply, params = causal_lm(tiny.tiny("llama"))
    tokens, attention = (x.unflatten(0, (3, answers)) for x in answered(3, answers))
    mask = attention & (torch.arange(9) >= 5)
    ref = torch.randn(3, answers, 9, dtype=torch.float64)
    weight = torch.full((3,), 1 / 3, dtype=torch.float64)
    recipe = recipes.dpo if answers == 2 else recipes.kto
    assert_same(recipe.loss(apply), params, DpoBatch(tokens, attention, mask, ref, weight))


def pairs(prompts, **more):
    tokens, attention = (x.unflatten(0, (prompts, 2)) for x in answered(prompts, 2, **more))
    mask = attention & (torch.arange(tokens.shape[-1]) >= 5)
    return PairBatch(tokens, attention, mask, torch.full((prompts,), 1 / prompts))


@pytest.mark.parametrize("pool", [last_token, mean_pool])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_scores_of_pairs_have_the_same_loss_and_gradient(family, pool):
    apply, params = reward_model(tiny.tiny(family), random.key(1), pool=pool)
    assert_same(reward_loss(apply), params, pairs(3))


@pytest.mark.parametrize("again", [False, True])
def test_no_reward_model_reads_a_shared_prompt_twice(again):
    module, read = tiny.tiny("llama"), []
    make = partial(reward_model, key=random.key(1))
    apply, params = checkpointed(make, module) if again else make(module)
    assert_same(reward_loss(apply), params, pairs(3))

    def counting(params, tokens, attention):
        read.append(sum(x.numel() for x in tokens))
        return apply(params, tokens, attention)

    of_asked(of_shared(autograd_gradient))(reward_loss(counting))(params, pairs(3), KEY)
    assert read == [3 * 5 + 6 * 4]


def test_a_prompt_and_its_answers_are_one_lookup_with_one_gradient_of_the_table():
    config = tiny.hf.LlamaConfig(**tiny.GROUPED | {"vocab_size": 4096})
    module = tiny.seeded(lambda: tiny.hf.LlamaForCausalLM(config))
    apply, params = reward_model(module, random.key(1))
    once = of_asked(of_shared(autograd_gradient))(reward_loss(apply))
    once(params, pairs(3), KEY)
    table = params["embed_tokens.weight"].nbytes
    assert peak(lambda: once(params, pairs(3), KEY)) < 1.5 * table


@pytest.mark.parametrize("make", [partial(reward_model, key=random.key(1)), classifier])
def test_an_encoder_whose_prompts_see_the_answers_reads_whole_rows(make):
    config = tiny.hf.BertConfig(**tiny.WIDE, num_labels=1)
    module = tiny.seeded(lambda: tiny.hf.BertForSequenceClassification(config))
    apply, params = make(module)
    assert_same(reward_loss(apply), params, pairs(3))


def test_it_composes_with_torch_func_and_with_another_precision():
    apply, params = causal_lm(tiny.tiny("llama"))
    batch = batches.asked(policy_batch(*answered(2, 3)))
    whole = functional_gradient(of_policy(apply))(params, batch, KEY)
    once = functional_gradient(of_policy(apply))(params, prefix.shared(batch), KEY)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-7)
    single = in_dtype(causal_lm(tiny.tiny("llama")), torch.float32)
    found = autograd_gradient(of_policy(single.apply))(params, prefix.shared(batch), KEY)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)


def test_log_probs_of_shared_prompts_are_those_of_whole_rows():
    apply, params = causal_lm(tiny.tiny("gpt2"))
    tokens, attention = answered(3, 2)
    whole = next_token_logprobs(apply)(params, tokens, attention)
    once = next_token_logprobs(apply, last=4)
    got = once(params, *prefix.with_prefix(tokens, attention, 4))
    kept = attention & (torch.arange(9) >= 5)
    torch.testing.assert_close(torch.where(kept, got, 0), torch.where(kept, whole, 0))


# where rows part


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_groups_are_the_largest_of_one_size_in_which_all_rows_agree(runs, seed):
    tokens, attention = answered(len(runs), 1, seed=seed)
    tokens[:, 0], attention[:, 0] = torch.arange(len(runs)), True
    of = torch.repeat_interleave(torch.tensor(runs))
    tokens, attention = tokens[of], attention[of]
    tokens[:, 5:] = torch.randint(3, 9, (len(of), 4))
    got, seen = prefix.with_prefix(tokens, attention, 4)
    expected = math.gcd(*runs)
    if expected == 1:
        assert got is tokens and seen is attention
    else:
        assert got.rest.shape == seen.rest.shape == (len(of) // expected, expected, 4)
        for x, parts in ((tokens, got), (attention, seen)):
            again = torch.cat([prefix.each_of(parts.prefix, expected), parts.rest.flatten(0, 1)], 1)
            assert torch.equal(again, x)


@pytest.mark.parametrize("last", [0, 1, 8, 9])
def test_too_little_before_or_after_is_not_shared(last):
    tokens, attention = answered(2, 2)
    assert prefix.with_prefix(tokens, attention, last)[0] is tokens


def test_rows_that_differ_in_padding_alone_are_not_shared():
    tokens, attention = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    attention[1, 0] = False
    assert prefix.with_prefix(tokens, attention, 3)[0] is tokens


def test_packed_rows_and_batches_of_other_kinds_stay_as_they_are():
    tokens = torch.ones(4, 6, dtype=torch.int64)
    packed = SftBatch(tokens, tokens, torch.ones(4, 2))
    assert prefix.shared(packed).tokens is tokens
    pair = {"tokens": tokens}
    assert prefix.shared(pair) is pair


def test_activations_that_are_computed_again_are_the_same():
    module = tiny.tiny("llama")
    apply, params = checkpointed(causal_lm, module)
    assert_same(of_policy(apply), params, policy_batch(*answered(3, 2)))


@pytest.mark.compile
def test_one_graph_serves_all_prompts_and_widths_and_another_a_single_prompt():
    apply, params = in_dtype(causal_lm(tiny.tiny("llama")), torch.float32)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = of_asked(of_shared(partial(compiled_gradient, rows=8, time=12, backend=counted)))
    step, plain = compiled(of_policy(apply)), autograd_gradient(of_policy(apply))
    for prompts, prompt, answer in [(2, 5, 4), (4, 3, 6), (3, 6, 3), (2, 2, 2)]:
        batch = policy_batch(*answered(prompts, 3, prompt, answer), prompt)
        torch.testing.assert_close(
            step(params, batch, KEY), plain(params, batch, KEY), rtol=1e-3, atol=1e-4
        )
        assert len(graphs) == 1
    for prompt, answer in [(5, 4), (3, 6)]:
        batch = policy_batch(*answered(1, 3, prompt, answer), prompt)
        step(params, batch, KEY)
        assert len(graphs) == 2


@pytest.mark.compile
def test_a_blank_of_the_fewest_rows_and_tokens_is_enough_for_a_graph_of_all():
    apply, params = in_dtype(causal_lm(tiny.tiny("llama")), torch.float32)
    graphs = []
    counted = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    gradient = partial(compiled_gradient, rows=2, time=2, backend=counted)
    step = of_asked(of_shared(gradient))(of_policy(apply))
    batch = policy_batch(*answered(3, 2))
    plain = autograd_gradient(of_policy(apply))(params, batch, KEY)
    torch.testing.assert_close(step(params, batch, KEY), plain, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


def test_tokens_and_attention_of_two_kinds_are_refused():
    apply, params = causal_lm(tiny.tiny("llama"))
    tokens, attention = answered(2, 2)
    once, seen = prefix.with_prefix(tokens, attention, 4)
    with pytest.raises(TypeError, match="only one of them is Prefixed; make both"):
        apply(params, once, attention)
    with pytest.raises(ValueError, match="tokens"):
        apply(params, once, seen._replace(rest=seen.rest[..., 1:]))


def test_rows_that_are_too_long_with_their_prefix_are_refused():
    apply, params = causal_lm(tiny.tiny("llama"))
    tokens, attention = torch.ones(2, 30, dtype=torch.int64), torch.ones(2, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match="30.*at most 24"):
        apply(params, *prefix.with_prefix(tokens, attention, 10))


@pytest.mark.parametrize("where", ["prefix", "rest"])
def test_an_id_outside_of_the_vocabulary_is_refused_by_name(where):
    apply, params = causal_lm(tiny.tiny("llama"))
    tokens, attention = prefix.with_prefix(*answered(2, 2), 4)
    getattr(tokens, where)[0] = tiny.VOCAB
    with pytest.raises(ValueError, match=f"tokens.*{tiny.VOCAB}"):
        apply(params, tokens, attention)
