"""A step without logits is the step with them: same parameters, same numbers, less memory."""

import pytest
import rlhf_kernels
import tiny
import torch
import transformers as hf
from cases_steps import DPO, KEY, OPTIMIZER, POLICY, batch_of
from hypothesis import given, settings
from test_linear_logprobs import largest
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad

import rlhf_fn
from rlhf_fn.linear import linear_token_logprobs, linear_token_logprobs_and_entropy
from rlhf_fn.models import causal_lm
from rlhf_fn.projection import (
    Projection,
    likeliest,
    logprobs_and_entropy,
    logprobs_and_hits,
    of_projection,
    projected_lm,
)
from rlhf_fn.steps import (
    DpoBatch,
    PolicyBatch,
    SftBatch,
    autograd_gradient,
    functional_gradient,
    gradient_step,
    policy_loss,
    preference_loss,
    sft_loss,
    train_state,
)

each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
BOTH, ONE = of_projection(linear_token_logprobs_and_entropy), of_projection(linear_token_logprobs)
KERNEL = of_projection(rlhf_kernels.linear_token_logprobs_and_entropy)
each_floor = pytest.mark.parametrize(
    "token_logprobs",
    [pytest.param(BOTH, id="floor 0", marks=pytest.mark.slow), pytest.param(KERNEL, id="kernel")],
)
LOSSES = {
    "sft": (SftBatch, lambda apply, **k: sft_loss(apply, **k), ONE),
    "dpo": (DpoBatch, lambda apply, **k: preference_loss(apply, **DPO, **k), ONE),
    "policy": (PolicyBatch, lambda apply, **k: policy_loss(apply, **POLICY, **k), BOTH),
    "policy, no entropy bonus": (
        PolicyBatch,
        lambda apply, **k: policy_loss(apply, **POLICY | {"entropy_coef": 0.0}, **k),
        BOTH,
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def close(got, expected):
    """Norms are float32 in a float64 model."""
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def logits_of(projection):
    hidden, weight, bias = projection
    return hidden @ weight.mT + (0.0 if bias is None else bias)


@each_decoder
@given(rows=tiny.ragged())
@settings(max_examples=5)
def test_a_projection_is_the_logits_whatever_the_family_and_the_padding(family, rows):
    apply, params = causal_lm(tiny.tiny(family))
    project, same = projected_lm(tiny.tiny(family))
    projection = project(same, *rows)
    torch.testing.assert_close(same, params, rtol=0, atol=0)
    close(logits_of(projection), apply(params, *rows))
    close(likeliest(projection), apply(params, *rows).argmax(-1))


def with_a_bias():
    config = hf.PhiConfig(**tiny.WIDE)
    return tiny.seeded(lambda: hf.PhiForCausalLM(config))


def test_the_bias_of_a_head_is_part_of_its_projection():
    rows = torch.tensor([[1, 5, 3]]), torch.ones(1, 3, dtype=torch.bool)
    (apply, params), (project, same) = causal_lm(with_a_bias()), projected_lm(with_a_bias())
    assert project(same, *rows).bias is not None
    close(logits_of(project(same, *rows)), apply(params, *rows))


@each_loss
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
def test_a_loss_without_logits_is_the_loss_with_them(name, family, gradient):
    """Qwen2's head is its embedding: the one weight has the gradients of both."""
    kind, make, token_logprobs = LOSSES[name]
    module, batch = tiny.tiny(family), batch_of(kind)
    assert module.config.tie_word_embeddings == (family == "qwen2")
    (apply, params), project = causal_lm(module), projected_lm(module).apply
    expected = gradient(make(apply))(params, batch, KEY)
    close(gradient(make(project, token_logprobs=token_logprobs))(params, batch, KEY), expected)


@each_loss
def test_a_frozen_head_leaves_the_other_gradients_as_they_are(name):
    kind, make, token_logprobs = LOSSES[name]
    batch, (project, params) = batch_of(kind), projected_lm(tiny.tiny("llama"))
    loss = make(project, token_logprobs=token_logprobs)
    head = {"lm_head.weight": params["lm_head.weight"]}
    rest = {n: p for n, p in params.items() if n not in head}
    slopes, _ = grad(lambda p: loss(p | head, batch, KEY), has_aux=True)(rest)
    every, _ = grad(lambda p: loss(p, batch, KEY), has_aux=True)(params)
    close(slopes, {name: every[name] for name in rest})


def steps(module, token_logprobs=BOTH):
    """A policy step with logits, and one without."""
    policies = {causal_lm: {}, projected_lm: {"token_logprobs": token_logprobs}}
    for make, options in policies.items():
        apply, params = make(module)
        loss = policy_loss(apply, **POLICY, **options)
        yield gradient_step(loss, OPTIMIZER), train_state(params, OPTIMIZER)


@pytest.mark.compile
@each_floor
def test_a_compiled_step_without_logits_is_one_graph_for_all_lengths(token_logprobs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    (plain, state), (step, _) = steps(tiny.tiny("llama"), token_logprobs)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    torch.manual_seed(0)
    for time in (5, 6, 9, 12, 17):
        shape = 3, time
        attention = torch.arange(time) < torch.tensor([[time], [time - 2], [time - 3]])
        numbers = (torch.randn(shape).double() for _ in range(3))
        tokens = torch.randint(0, tiny.VOCAB, shape)
        batch = PolicyBatch(tokens, attention, *numbers, attention / attention.sum())
        for x in batch:
            torch._dynamo.mark_dynamic(x, 1)
        new, metrics = compiled(state, batch, KEY)
        expected, same = plain(state, batch, KEY)
        close(metrics, same)
        close(new.params, expected.params)
    assert counter.frame_count == 1


def test_a_step_without_logits_never_holds_tokens_by_vocab():
    sizes = tiny.GROUPED | {"vocab_size": 4000, "hidden_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    module = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).double()
    batch = batch_of(PolicyBatch)
    tall = PolicyBatch(*(x.repeat(6, 1) for x in batch))
    with_logits, without = (largest(step, state, tall, KEY) for step, state in steps(module))
    assert with_logits >= tall.tokens.numel() * 4000 * 6 / 7
    assert without <= max(tall.tokens.numel() * 4000 / 4, 4000 * 8)


def test_a_model_that_caps_or_scales_its_logits_has_no_projection():
    capped = hf.Gemma2Config(**tiny.GROUPED, head_dim=8, final_logit_softcapping=30.0)
    scaled = hf.CohereConfig(**tiny.GROUPED, logit_scale=0.0625)
    for module in (hf.Gemma2ForCausalLM(capped), hf.CohereForCausalLM(scaled)):
        with pytest.raises(TypeError, match="changes its logits after the head"):
            projected_lm(module)


def test_misuse_is_named():
    (apply, params), project = causal_lm(tiny.tiny("llama")), projected_lm(tiny.tiny("llama")).apply
    batch = batch_of(PolicyBatch)
    with pytest.raises(TypeError, match="projected_lm"):
        policy_loss(apply, **POLICY, token_logprobs=BOTH)(params, batch, KEY)
    with pytest.raises(TypeError, match="linear_token_logprobs_and_entropy"):
        policy_loss(project, **POLICY, token_logprobs=ONE)(params, batch, KEY)
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        project({n: p for n, p in params.items() if n != "lm_head.weight"}, *batch[:2])
    with pytest.raises(TypeError, match="causal language model"):
        projected_lm(tiny.tiny("bert"))


def test_likeliest_looks_at_every_part_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr("rlhf_fn.projection.CHUNK", 4)
    torch.manual_seed(0)
    projection = Projection(torch.randn(3, 9, 5), torch.randn(11, 5), torch.randn(11))
    assert torch.equal(likeliest(projection), logits_of(projection).argmax(-1))


HITS = of_projection(rlhf_kernels.linear_token_logprobs_and_hits)


@pytest.mark.parametrize(
    "token_logprobs", [ONE, BOTH, HITS, KERNEL], ids=["log π", "H", "hits", "kernel"]
)
def test_hits_are_the_likeliest_tokens_whatever_else_is_returned(token_logprobs, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(11, 5).double().requires_grad_()
    projection = Projection(torch.randn(3, 9, 5).double(), weight, torch.randn(11).double())
    tokens = torch.randint(0, 11, (3, 9))
    tokens[0] = likeliest(projection)[0]
    expected = logits_of(projection).argmax(-1) == tokens
    if token_logprobs is HITS:
        monkeypatch.delattr("rlhf_fn.projection.likeliest")  # which is another product
    logprobs, hits = logprobs_and_hits(token_logprobs)(projection, tokens)
    assert torch.equal(hits, expected) and not hits.all()
    close(logprobs, ONE(projection, tokens))
    assert logprobs.requires_grad


def test_hits_of_logits_are_those_of_their_projection():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 9, 11), torch.randint(0, 11, (3, 9))
    logprobs, hits = logprobs_and_hits(rlhf_fn.token_logprobs)(logits, tokens)
    assert torch.equal(hits, logits.argmax(-1) == tokens)
    assert torch.equal(logprobs, rlhf_fn.token_logprobs(logits, tokens))


def test_hits_are_never_taken_for_an_entropy():
    projection = Projection(torch.randn(2, 3, 5), torch.randn(11, 5), None)
    with pytest.raises(TypeError, match="linear_token_logprobs_and_entropy"):
        logprobs_and_entropy(HITS, temperature=1.0, spare=True)(projection, torch.zeros(2, 3).int())
