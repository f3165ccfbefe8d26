import itertools

import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from torch.func import grad, vmap

from rlhf_fn.models import (
    causal_lm,
    check_vocab,
    frozen,
    hidden_states,
    load_causal_lm,
    on_next_token,
    save_policy,
)
from rlhf_fn.skeletons import attention_mask

few = settings(max_examples=12)
each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
close = torch.testing.assert_close


def nll(logits, tokens):
    return -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def batch(seed=0):
    """Left padding, right padding, both, none."""
    lengths, starts, width = (4, 3, 2, 6), (2, 0, 3, 0), 6
    step, pairs = torch.arange(width), zip(starts, lengths)
    attention = torch.stack([(step >= s) & (step < s + n) for s, n in pairs])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny.VOCAB, (4, width), generator=generator), attention


def mean_loss(apply):
    """Σ −log p over the tokens that a token comes before."""
    aligned = on_next_token(nll)

    def loss(params, tokens, attention):
        kept = attention[..., 1:] & attention[..., :-1]
        per_token = aligned(apply(params, tokens, attention), tokens)[..., 1:]
        return torch.where(kept, per_token, 0.0).sum()

    return loss


@each_decoder
@given(rows=tiny.ragged())
@few
def test_logits_do_not_depend_on_padding_and_are_those_of_transformers(family, rows):
    tokens, attention = rows
    module = tiny.tiny(family)
    apply, params = causal_lm(module)
    padded = apply(params, tokens, attention)
    for row, kept, logits in zip(tokens, attention, padded):
        alone = row[kept]
        close(logits[kept], apply(params, alone, tiny.whole(alone)))
        theirs = tiny.fresh(family).eval()(alone[None]).logits[0]
        close(logits[kept], theirs)


@each_decoder
def test_what_padding_holds_changes_no_bit_of_logits_and_gradients(family):
    tokens, attention = batch()
    apply, params = causal_lm(tiny.tiny(family))
    other = tiny.garbage(tokens, attention)
    assert not other.equal(tokens)
    a, b = apply(params, tokens, attention), apply(params, other, attention)
    assert a[attention].equal(b[attention])
    slope = grad(mean_loss(apply))
    close(slope(params, tokens, attention), slope(params, other, attention), rtol=0, atol=1e-14)


@each_decoder
def test_rows_of_padding_alone_are_finite_forward_and_backward(family):
    tokens, attention = batch()
    attention[0] = False
    apply, params = causal_lm(tiny.tiny(family))
    assert apply(params, tokens, attention).isfinite().all()
    slopes = grad(lambda p: apply(p, tokens, attention).square().sum())(params)
    assert all(x.isfinite().all() for x in slopes.values())


@each_decoder
def test_gradients_of_examples_add_up_to_that_of_the_batch(family):
    tokens, attention = batch()
    apply, params = causal_lm(tiny.tiny(family))
    slope = grad(mean_loss(apply))
    each = vmap(slope, in_dims=(None, 0, 0))(params, tokens, attention)
    close({name: x.sum(0) for name, x in each.items()}, slope(params, tokens, attention))


@each_decoder
def test_the_gradient_is_that_of_the_module_itself(family):
    tokens, _ = batch()
    module = tiny.fresh(family).eval()
    apply, params = causal_lm(module)
    on_next_token(nll)(module(tokens).logits, tokens).sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    close(grad(mean_loss(apply))(params, tokens, tiny.whole(tokens)), expected)


@each_decoder
def test_a_population_of_parameters_is_computed_by_vmap(family):
    tokens, attention = batch()
    (apply, one), (_, two) = causal_lm(tiny.tiny(family)), causal_lm(tiny.fresh(family, seed=1))
    both = {name: torch.stack([one[name], two[name]]) for name in one}
    many = vmap(lambda p: apply(p, tokens, attention))(both)
    expected = [apply(params, tokens, attention) for params in (one, two)]
    close(many, torch.stack(expected))
    assert not expected[0].allclose(expected[1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.compile
def test_a_compiled_gradient_is_one_graph_and_the_same(backend):
    apply, params = causal_lm(tiny.tiny("llama"))
    slope, rows = grad(mean_loss(apply)), batch()
    torch._dynamo.reset()
    compiled = torch.compile(slope, fullgraph=True, backend=backend)
    close(compiled(params, *rows), slope(params, *rows), rtol=1e-5, atol=1e-6)  # norms are float32


@pytest.mark.parametrize("family", [*tiny.DECODERS, *tiny.ENCODERS])
def test_leading_axes_are_free(family):
    tokens, attention = batch()
    apply, params = hidden_states(tiny.tiny(family))
    flat = apply(params, tokens, attention)
    close(apply(params, tokens.view(2, 2, 6), attention.view(2, 2, 6)), flat.view(2, 2, 6, -1))
    close(apply(params, tokens[0], attention[0]), flat[0])


@each_decoder
def test_dropout_is_off_and_the_module_is_left_as_it_was(family):
    tokens, attention = batch()
    module = tiny.fresh(family)
    before, config = frozen(module.state_dict()), module.config.to_dict()
    apply, params = causal_lm(module)
    close(apply(params, tokens, attention), apply(params, tokens, attention), rtol=0, atol=0)
    assert module.training and module.config.to_dict() == config
    assert all(p.requires_grad for p in module.parameters())
    close(dict(module.state_dict()), before, rtol=0, atol=0)


@each_decoder
def test_params_and_frozen_params_share_no_storage_with_anything(family):
    module = tiny.tiny(family)
    params = causal_lm(module).params
    reference = frozen(params)
    assert params.keys() == reference.keys() == dict(module.named_parameters()).keys()
    trees = (dict(module.named_parameters()), params, reference)
    pointers = [p.data_ptr() for tree in trees for p in tree.values()]
    assert len(set(pointers)) == 3 * len(params)
    assert not any(p.requires_grad for tree in trees[1:] for p in tree.values())


@each_decoder
def test_a_saved_policy_gives_the_same_logits_to_everybody(family, tmp_path):
    tokens, _ = batch()
    apply, params = causal_lm(tiny.tiny(family))
    params = {name: p + 0.01 for name, p in params.items()}
    save_policy(tiny.tiny(family), params, tmp_path)
    logits = apply(params, tokens, tiny.whole(tokens))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(theirs(tokens).logits, logits)
    loaded = load_causal_lm(tmp_path)
    again = causal_lm(loaded)
    assert loaded.dtype == torch.float32 and not loaded.training
    close(
        again.apply(again.params, tokens, tiny.whole(tokens)), logits.float(), rtol=1e-4, atol=1e-5
    )


def test_the_shift_pairs_every_token_with_the_logits_before_it():
    tokens, _ = batch()
    logits = torch.randn(4, 6, tiny.VOCAB, dtype=torch.float64)
    aligned = on_next_token(nll)(logits, tokens)
    for i in range(4):
        assert aligned[i, 0] == 0
        for t in range(1, 6):
            close(aligned[i, t], -logits[i, t - 1].log_softmax(-1)[tokens[i, t]])


@given(rows=tiny.ragged())
@few
def test_an_encoder_sees_both_ways_and_not_the_padding(rows):
    tokens, attention = rows
    for family in tiny.ENCODERS:
        apply, params = hidden_states(tiny.tiny(family))
        padded = apply(params, tokens, attention)
        for row, kept, hidden in zip(tokens, attention, padded):
            alone = row[kept].where(row[kept] != 0, 3)  # RoBERTa counts ids other than pad
            row = row.masked_scatter(kept, alone)
            close(apply(params, row, kept)[kept], apply(params, alone, tiny.whole(alone)))
            theirs = tiny.fresh(family).eval().base_model(alone[None]).last_hidden_state[0]
            close(apply(params, alone, tiny.whole(alone)), theirs)
            assert hidden.isfinite().all()


@given(rows=tiny.ragged(least=0))
@few
def test_every_position_reads_itself_so_that_no_softmax_is_empty(rows):
    real = rows[1]
    for causal in (True, False):
        mask = attention_mask(real, causal=causal)
        for b, q, k in itertools.product(*map(range, (len(real), *mask.shape[-2:]))):
            assert mask[b, 0, q, k] == (k == q or (real[b, [q, k]].all() and (k < q or not causal)))


def linear_attention():
    module = tiny.fresh("llama")
    module.config.layer_types = ["linear_attention", "full_attention"]
    return module


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=13, hidden_size=16, n_layer=1, n_head=2))


REFUSED = {
    "no transformer": lambda: torch.nn.Linear(2, 2),
    "no head": lambda: tiny.tiny("llama").model,
    "an encoder": lambda: tiny.tiny("bert"),
    "no positions": bloom,
    "no mask": linear_attention,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_causal_language_model_with_positions_is_refused(make):
    module = make()
    with pytest.raises(TypeError, match=type(module).__name__):
        causal_lm(module)


def test_misuse_is_refused_by_name():
    tokens, attention = batch()
    apply, params = causal_lm(tiny.tiny("llama"))
    with pytest.raises(ValueError, match="attention"):
        apply(params, tokens, attention[:, 1:])
    with pytest.raises(TypeError, match="attention"):
        apply(params, tokens, attention.double())
    with pytest.raises(ValueError, match=r"\[0, 13\)"):
        apply(params, tokens + tiny.VOCAB, attention)
    with pytest.raises(ValueError, match="norm.weight"):
        apply({k: v for k, v in params.items() if k != "model.norm.weight"}, tokens, attention)
    long = torch.zeros(1, tiny.LONGEST + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"at most {tiny.LONGEST}"):
        apply(params, long, tiny.whole(long))
    apply(params, long, tiny.whole(long) & (torch.arange(tiny.LONGEST + 1) > 0))


def test_a_row_longer_than_an_attention_window_is_refused():
    config = hf.MistralConfig(**tiny.WIDE, num_key_value_heads=2, sliding_window=4)
    module = hf.MistralForCausalLM(config).eval()
    apply, params = causal_lm(module)
    tokens, _ = batch()
    short = tokens[:, :4]
    close(apply(params, short, tiny.whole(short)), module(short).logits)
    with pytest.raises(ValueError, match="window"):
        apply(params, tokens, tiny.whole(tokens))


def test_a_path_without_a_causal_language_model_in_safetensors_is_refused(tmp_path):
    with pytest.raises(OSError):
        load_causal_lm(tmp_path / "nothing")
    tiny.tiny("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(TypeError, match="causal"):
        load_causal_lm(tmp_path / "bert")
    tiny.tiny("llama").model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="lm_head"):
        load_causal_lm(tmp_path / "headless")
    tiny.tiny("llama").save_pretrained(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(tiny.tiny("llama").state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(tmp_path / "pickle")


def test_parameters_of_another_model_are_not_saved(tmp_path):
    params = causal_lm(tiny.tiny("llama")).params
    with pytest.raises(ValueError, match="params do not fit"):
        save_policy(tiny.tiny("gpt2"), params, tmp_path)
    wrong = params | {"model.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"model.norm.weight is \(3,\), expected \(16,\)"):
        save_policy(tiny.tiny("llama"), wrong, tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    class Tokenizer:
        def __init__(self, size):
            self.get_vocab = lambda: {str(i): i for i in range(size)}

    check_vocab(Tokenizer(tiny.VOCAB), tiny.tiny("llama"))
    with pytest.raises(ValueError, match="up to 13"):
        check_vocab(Tokenizer(tiny.VOCAB + 1), tiny.tiny("llama"))
