"""Low-rank adapters: W' = W + s B A, which never exists, and a base that nobody writes to."""

from functools import partial

import pytest
import tiny
import torch
from cases_lora import KEY, ROWS, by_hand, drawn, everything, pull, tuned
from hypothesis import given, settings
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_fn import random, tree
from rlhf_fn.heads import value_model
from rlhf_fn.lora import Lora, adapted, all_linear, by_rank, by_root_rank, lora, merge
from rlhf_fn.models import causal_lm
from rlhf_fn.precision import cast
from rlhf_fn.room import peak_bytes
from rlhf_fn.steps import autograd_gradient, functional_gradient

each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
close = torch.testing.assert_close
same = partial(close, rtol=0, atol=0)


@each_decoder
def test_an_adapter_whose_b_is_zero_is_the_base_to_the_last_bit(family):
    module = tiny.tiny(family)
    base = causal_lm(module)
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)
    assert apply(adapter, *ROWS).equal(base.apply(base.params, *ROWS))
    changed = adapter | {n: x + 1 for n, x in adapter.items() if "lora_A" in n}
    assert apply(changed, *ROWS).equal(base.apply(base.params, *ROWS))


@each_decoder
@given(batch=tiny.ragged())
@settings(max_examples=8)
def test_adapted_logits_are_those_of_the_merged_weights(family, batch):
    module, base, low_rank, apply, adapter = tuned(family)
    expected = base.apply(by_hand(module, base.params, adapter, 4 / 3), *batch)
    close(apply(adapter, *batch), expected)
    assert not expected.allclose(base.apply(base.params, *batch), atol=1e-3)


@each_decoder
@pytest.mark.parametrize("scale, s", [(by_rank, 4 / 3), (by_root_rank, 4 / 3**0.5)])
def test_merged_weights_are_those_of_the_equation_and_share_the_others(family, scale, s):
    module, base, low_rank, _, adapter = tuned(family, scale=scale)
    merged = merge(module, base.params, adapter, low_rank)
    close(merged, by_hand(module, base.params, adapter, s), rtol=1e-14, atol=1e-15)
    targets = {n.replace(".lora_A.", ".") for n in adapter if "lora_A" in n}
    for name, x in merged.items():
        assert (x.data_ptr() == base.params[name].data_ptr()) == (name not in targets)


@each_decoder
def test_weights_merged_in_half_precision_are_the_wide_ones_rounded_one_after_another(family):
    module, base, low_rank, _, adapter = tuned(family)
    merged = partial(merge, module, base.params, low_rank=low_rank, dtype=torch.bfloat16)
    wide = merge(module, base.params, adapter, low_rank)
    same(merged(adapter=adapter), cast(wide, torch.bfloat16))
    rounded = sum(2 * x.numel() for x in wide.values())
    largest = max(x.nbytes for x in wide.values())
    held = peak_bytes(lambda x: merged(adapter=x), adapter)
    assert rounded <= held <= rounded + 4 * largest < sum(x.nbytes for x in wide.values())


@each_decoder
def test_the_gradient_of_an_adapter_is_that_of_merged_weights_by_the_chain_rule(family):
    module, base, _, apply, adapter = tuned(family)
    s, merged = 4 / 3, by_hand(module, base.params, adapter, 4 / 3)
    slopes = grad(lambda p: pull(base.apply(p, *ROWS)))(merged)
    expected = {}
    for name in (n.removesuffix(".lora_A.weight") for n in adapter if "lora_A" in n):
        g = slopes[f"{name}.weight"]
        g = g.T if isinstance(module.get_submodule(name), Conv1D) else g
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        expected |= {a: s * adapter[b].T @ g, b: s * g @ adapter[a].T}
    # norms are float32 in a float64 Llama
    close(grad(lambda p: pull(apply(p, *ROWS)))(adapter), expected, rtol=1e-5, atol=1e-6)


class Made(TorchDispatchMode):
    """How many numbers the largest tensor has that is made while this is on."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        new = (x for x in tensors(out) if x.untyped_storage().data_ptr() not in given)
        self.largest = max(self.largest, *(x.numel() for x in new), 0)
        return out


def tensors(x):
    return [leaf for leaf in tree.leaves(x) if isinstance(leaf, torch.Tensor)]


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 70}


@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
def test_no_tensor_as_large_as_a_weight_is_ever_made(gradient):
    """Neither W', nor a copy of W, nor its gradient: rows are few, so the largest is that."""
    module = tiny.seeded(lambda: LlamaForCausalLM(LlamaConfig(**tiny.WIDE | WIDE))).float()
    base = causal_lm(module)
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)

    def loss(p, batch, key):
        return apply(p, *batch).square().sum(), {}

    before = {name: x.clone() for name, x in base.params.items()}
    with Made() as made:
        slopes, _ = gradient(loss)(adapter, ROWS, KEY)
    assert slopes.keys() == adapter.keys() and made.largest < 64 * 64
    with Made() as made:
        grad(lambda p: base.apply(p, *ROWS).square().sum())(base.params)
    assert made.largest >= 64 * 64
    same(base.params, before)
    assert not any(x.requires_grad or x.grad is not None for x in base.params.values())


@each_decoder
def test_adapters_on_one_base_are_a_batch_by_vmap(family):
    _, _, _, apply, one = tuned(family)
    many = [one, drawn(one, seed=1), {n: torch.zeros_like(x) for n, x in one.items()}]
    stacked = {n: torch.stack([x[n] for x in many]) for n in one}
    together = vmap(lambda p: apply(p, *ROWS))(stacked)
    close(together, torch.stack([apply(p, *ROWS) for p in many]))
    slope = grad(lambda p: pull(apply(p, *ROWS)))
    slopes = vmap(slope)(stacked)
    close({n: x[1] for n, x in slopes.items()}, slope(many[1]), rtol=1e-6, atol=1e-8)


@each_decoder
def test_forward_mode_is_the_slope_of_backward_mode(family):
    _, _, _, apply, adapter = tuned(family)

    def scalar(p):
        return pull(apply(p, *ROWS))

    direction = drawn(adapter, seed=2)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = jvp(scalar, (adapter,), (direction,))
    slopes = grad(scalar)(adapter)
    close(slope, sum((slopes[n] * direction[n]).sum() for n in slopes), rtol=1e-4, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_compiled_gradient_is_one_graph_and_the_same(family):
    _, _, _, apply, adapter = tuned(family)
    slope = grad(lambda p, *batch: pull(apply(p, *batch)))
    torch._dynamo.reset()
    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    close(compiled(adapter, *ROWS), slope(adapter, *ROWS), rtol=1e-5, atol=1e-6)


@each_decoder
def test_a_is_uniform_within_one_over_root_in_and_a_function_of_the_key(family):
    module = tiny.tiny(family)
    base, low_rank = causal_lm(module).params, everything(module, rank=200)
    before = torch.get_rng_state()
    _, adapter = lora(causal_lm, module, base, low_rank, KEY)
    assert before.equal(torch.get_rng_state())
    same(adapter, lora(causal_lm, module, base, low_rank, KEY).params)
    other = lora(causal_lm, module, base, low_rank, random.key(1)).params
    drawn_so_far = set()
    for name, x in adapter.items():
        if "lora_B" in name:
            assert not x.any()
            continue
        bound = x.shape[-1] ** -0.5
        assert x.abs().max() <= bound and x.abs().max() > 0.99 * bound
        assert abs(x.mean()) < 0.05 * bound
        assert x.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not x.equal(other[name])
        drawn_so_far.add(tuple(x.flatten()[:4].tolist()))
    assert len(drawn_so_far) == len(adapter) // 2


def test_beside_a_base_in_half_precision_an_adapter_is_float32():
    module = tiny.fresh("llama").bfloat16()
    base = causal_lm(module)
    apply, adapter = lora(causal_lm, module, base.params, everything(module), KEY)
    adapter = drawn(adapter)
    logits = apply(adapter, *ROWS)
    assert {x.dtype for x in adapter.values()} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    assert not logits.equal(base.apply(base.params, *ROWS))
    slopes = grad(lambda p: apply(p, *ROWS).float().square().sum())(adapter)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in slopes.values())
    merged = merge(module, base.params, adapter, everything(module))
    assert {x.dtype for x in merged.values()} == {torch.bfloat16}


ALL = {
    "llama": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "qwen2": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "qwen3": "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
    "gpt2": "c_attn c_fc c_proj",
    "neox": "dense dense_4h_to_h dense_h_to_4h query_key_value",
    "opt": "fc1 fc2 k_proj out_proj q_proj v_proj",
    "bert": "dense key query value",
}


@pytest.mark.parametrize("family", ALL)
def test_all_linear_layers_are_those_of_the_backbone(family):
    assert " ".join(all_linear(tiny.tiny(family))) == ALL[family]


@pytest.mark.parametrize("targets", [("q_proj",), ("layers.1.self_attn.q_proj", "down_proj")])
def test_only_what_is_named_is_adapted(targets):
    module = tiny.tiny("llama")
    low_rank = Lora(2, 1.0, targets, by_rank)
    adapter = lora(causal_lm, module, causal_lm(module).params, low_rank, KEY).params
    expected = {
        ("q_proj",): [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)],
        ("layers.1.self_attn.q_proj", "down_proj"): [
            "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
        ],
    }[targets]  # fmt: skip
    names = {f"{name}.lora_{x}.weight" for name in expected for x in "AB"}
    assert adapter.keys() == names


MISUSED = {
    "rank 0": ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    "half a rank": ({"rank": 0.5}, TypeError, "rank must be an int|Type-check"),
    "alpha 0": ({"alpha": 0.0}, ValueError, "alpha must be a finite number > 0, got 0.0"),
    "no target": ({"targets": ()}, ValueError, "targets is empty; choose from down_proj, gate"),
    "unknown": ({"targets": ("q",)}, ValueError, "'q', which is no linear layer .* q_proj, up"),
    "embedding": ({"targets": ("embed_tokens",)}, ValueError, "'embed_tokens', which is no lin"),
    "part of a name": ({"targets": ("proj",)}, ValueError, "'proj', which is no linear layer"),
    "head": ({"targets": ("q_proj", "lm_head")}, ValueError, "'lm_head', the head, which takes no"),
    "one string": ({"targets": "q_proj"}, TypeError, r"write \('q_proj',\)"),
}


@pytest.mark.parametrize("what", MISUSED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_misuse_is_refused_by_name(family, what):
    changes, error, says = MISUSED[what]
    module = tiny.tiny(family)
    low_rank = Lora(2, 1.0, ("q_proj",), by_rank)._replace(**changes)
    with pytest.raises(error, match=says):
        lora(causal_lm, module, causal_lm(module).params, low_rank, KEY)


def test_parameters_of_something_else_are_refused():
    module, base, low_rank, apply, adapter = tuned("llama")
    with pytest.raises(ValueError, match="base and make.module. differ in embed_tokens"):
        lora(partial(value_model, key=KEY), module, base.params, low_rank, KEY)
    with pytest.raises(ValueError, match="is adapted already, at model.layers.0"):
        adapted(adapted(module, low_rank), low_rank)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    less = {n: x for n, x in adapter.items() if n != name}
    with pytest.raises(ValueError, match=name):
        apply(less, *ROWS)
    with pytest.raises(ValueError, match=rf"{name} is None, expected \(3, 16\)"):
        merge(module, base.params, less, low_rank)
    with pytest.raises(ValueError, match=r"is \(3, 24\), expected \(4, 24\)"):
        merge(module, base.params, adapter, low_rank._replace(rank=4))
