import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from rlhf_fn import tree
from rlhf_fn.decoding import decoder
from rlhf_fn.models import causal_lm
from rlhf_fn.recompute import layerwise

few = settings(max_examples=12)
each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
close = torch.testing.assert_close


def left_padded(lengths, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, tiny.VOCAB, (len(lengths), width), generator=generator)
    return tokens, torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def replay(model, params, tokens, attention, prompt, room):
    """Feed given tokens one by one: the logits after each, from the last of the prompt on."""
    logits, cache = model.prefill(params, tokens[:, :prompt], attention[:, :prompt], room)
    out = [logits]
    for i in range(prompt, tokens.shape[1]):
        logits, cache = model.decode(params, tokens[:, i], attention[:, : i + 1], i, cache)
        out.append(logits)
    return torch.stack(out, 1)


@each_decoder
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    new=st.integers(0, 6),
    room=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@few
def test_decoding_token_by_token_gives_the_logits_of_the_whole(family, lengths, new, room, seed):
    prompt = max(lengths) + 1
    tokens, attention = left_padded([n + new for n in lengths], prompt + new, seed)
    module = tiny.tiny(family)
    apply, params = causal_lm(module)
    steps = replay(decoder(module), params, tokens, attention, prompt, prompt + new + room)
    close(steps, apply(params, tokens, attention)[:, prompt - 1 :])


@each_decoder
def test_a_decoder_that_prepares_a_layer_when_it_runs_has_the_bits_of_the_decoder(family):
    tokens, attention = left_padded([4, 7], 7)
    module = tiny.tiny(family)
    params, layers = causal_lm(module).params, module.config.num_hidden_layers
    asked = []

    def prepare(params):
        asked.append(sum(p.nbytes for p in params.values()))
        return tree.map(lambda p: 0.5 * p, params)

    reads, apply, outside, held = layerwise(module, prepare=prepare)
    steps = replay(reads, outside(params), tokens, attention, 4, 7)
    halved = tree.map(lambda p: 0.5 * p, params)
    close(steps, replay(decoder(module), halved, tokens, attention, 4, 7), rtol=0, atol=0)
    first, *each = asked
    assert len(each) == 4 * layers, "to read the prompt, and for each token"
    assert held(params) == first + max(each)
    assert first + sum(each) / 4 == sum(p.nbytes for p in params.values())
    expected = causal_lm(module).apply(halved, tokens, attention)
    close(apply(outside(params), tokens, attention), expected, rtol=0, atol=0)


@each_decoder
def test_what_padding_holds_and_how_much_there_is_changes_nothing(family):
    tokens, attention = left_padded([4, 7], 7)
    model, params = decoder(tiny.tiny(family)), causal_lm(tiny.tiny(family)).params
    steps = replay(model, params, tokens, attention, 4, 7)
    other = tiny.garbage(tokens, attention)
    close(replay(model, params, other, attention, 4, 7), steps, rtol=0, atol=0)
    wider = F.pad(tokens, (3, 0), value=5), F.pad(attention, (3, 0))
    close(replay(model, params, *wider, 7, 12), steps)


@each_decoder
def test_a_row_that_has_stopped_disturbs_no_other(family):
    tokens, attention = left_padded([5, 7], 7)
    model, params = decoder(tiny.tiny(family)), causal_lm(tiny.tiny(family)).params
    steps = replay(model, params, tokens, attention, 4, 7)
    tokens[0, 5:], attention[0, 5:] = 0, False
    stopped = replay(model, params, tokens, attention, 4, 7)
    close(stopped[1], steps[1], rtol=0, atol=0)
    close(stopped[0, :2], steps[0, :2], rtol=0, atol=0)
    assert stopped.isfinite().all()


def test_a_population_of_policies_decodes_under_vmap():
    tokens, attention = left_padded([3, 5], 6)
    model = decoder(tiny.tiny("llama"))
    params = [causal_lm(tiny.fresh("llama", seed)).params for seed in (0, 1)]
    both = {name: torch.stack([p[name] for p in params]) for name in params[0]}
    many = vmap(lambda p: replay(model, p, tokens, attention, 4, 6))(both)
    close(many, torch.stack([replay(model, p, tokens, attention, 4, 6) for p in params]))


def test_decoding_tracks_no_gradient_and_holds_one_buffer_per_layer():
    tokens, attention = left_padded([3, 5], 5)
    params = {k: p.requires_grad_() for k, p in causal_lm(tiny.tiny("llama")).params.items()}
    logits, cache = decoder(tiny.tiny("llama")).prefill(params, tokens, attention, 9)
    assert not logits.requires_grad
    assert [x.shape for layer in cache for x in layer] == 4 * [torch.Size([2, 2, 9, 4])]


def test_wrong_inputs_are_refused_by_name():
    tokens, attention = left_padded([3, 5], 5)
    model, params = decoder(tiny.tiny("llama")), causal_lm(tiny.tiny("llama")).params
    with pytest.raises(TypeError, match="causal"):
        decoder(tiny.tiny("bert"))
    with pytest.raises(TypeError, match="attention"):
        model.prefill(params, tokens, attention.long(), 9)
    with pytest.raises(ValueError, match="length must be at least 5"):
        model.prefill(params, tokens, attention, 4)
    with pytest.raises(ValueError, match=f"at most {tiny.LONGEST}"):
        model.prefill(params, tokens, attention, tiny.LONGEST + 1)
    with pytest.raises(ValueError, match="params"):
        model.prefill({}, tokens, attention, 9)
    _, cache = model.prefill(params, tokens, attention, 9)
    with pytest.raises(ValueError, match="at least index \\+ 1 = 6"):
        model.decode(params, tokens[:, 0], attention, 5, cache)


@pytest.mark.compile
def test_a_compiled_decode_is_one_graph_and_the_same():
    tokens, attention = left_padded([2, 4], 4)
    model, params = decoder(tiny.tiny("llama")), causal_lm(tiny.tiny("llama")).params
    torch._dynamo.reset()
    step = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    compiled = replay(model._replace(decode=step), params, tokens, attention, 3, 4)
    close(compiled, replay(model, params, tokens, attention, 3, 4))
