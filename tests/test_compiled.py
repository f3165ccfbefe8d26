"""The gradient of a compiled loss: the numbers of the eager one, in one graph for all sizes."""

from functools import partial
from types import SimpleNamespace

import pytest
import runs
import torch
from cases_steps import CASES, KEY, LM, POLICY, batch_of, llama
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fn import tree
from rlhf_fn.cli import main
from rlhf_fn.compiled import compiled_gradient, compiled_loss
from rlhf_fn.fused import fused_adamw
from rlhf_fn.losses import PolicyBatch, policy_loss
from rlhf_fn.models import causal_lm, frozen
from rlhf_fn.sampler import sampler
from rlhf_fn.steps import (
    autograd_gradient,
    donating_step,
    functional_gradient,
    of_asked,
    train_state,
)

pytestmark = pytest.mark.compile
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.01}


def close(got, expected):
    """Llama's norms are float32 in a float64 model."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def resized(batch, rows, more):
    """The first rows, with more padding."""
    cut = tree.map(lambda x: x[:rows], batch)
    return tree.map(lambda x: pad(x, (0, more)) if x.ndim > 1 else x, cut)


def compiles_once(name):
    torch._dynamo.reset()
    case, counter = CASES[name], CompileCounterWithBackend("aot_eager")
    compiled = compiled_gradient(case.loss, rows=4, time=9, backend=counter)
    eager, batch = autograd_gradient(case.loss), batch_of(case.batch)
    for rows, more in ((5, 0), (3, 2), (5, 1), (2, 8), (4, 3)):
        one = resized(batch, rows, more)
        before = tree.map(torch.clone, one)
        found = compiled(case.params, one, KEY)
        close(found, eager(case.params, one, KEY))
        torch.testing.assert_close(one, before, rtol=0, atol=0)
        assert not any(x.requires_grad for x in tree.leaves(found))
    assert counter.frame_count == 1


def test_rows_and_lengths_compile_once_and_agree_with_eager():
    compiles_once("dpo")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_loss_compiles_once_and_agrees_with_eager(name):
    compiles_once(name)


def long_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return causal_lm(LlamaForCausalLM(config).double())


def rows_of(time, rows=3):
    torch.manual_seed(time)
    attention = torch.arange(time) < torch.tensor([[time], [time - 2], [time - 3]])[:rows]
    numbers = (torch.randn(rows, time).double() for _ in range(3))
    tokens = torch.randint(0, 11, (rows, time))
    return PolicyBatch(tokens, attention, *numbers, attention / attention.sum())


def test_seven_lengths_from_17_to_64_are_one_compilation_chosen_by_no_batch():
    apply, params = long_llama()
    loss, seen = policy_loss(apply, **POLICY), []

    def backend(graph, inputs):
        sizes = [n for x in inputs for n in (x.shape if isinstance(x, torch.Tensor) else [x])]
        seen.append({n.node.hint if isinstance(n, torch.SymInt) else n for n in sizes})
        return graph

    for lengths in ((17, 64, 33, 18, 63, 40, 29), (40, 17)):
        torch._dynamo.reset()
        compiled = compiled_gradient(loss, rows=7, time=57, backend=backend)
        for time in lengths:
            batch = rows_of(time)
            close(compiled(params, batch, KEY), autograd_gradient(loss)(params, batch, KEY))
    first, second = seen
    assert first == second and 57 in first and 7 in first and not first & {17, 40}


def test_prompts_of_any_width_are_left_out_of_one_graph():
    torch._dynamo.reset()
    apply, params = long_llama()
    loss, counter = policy_loss(apply, **POLICY), CompileCounterWithBackend("aot_eager")
    gradient = of_asked(partial(compiled_gradient, rows=3, time=40, backend=counter))(loss)
    for time, prompt in ((20, 1), (33, 9), (20, 18), (40, 30), (11, 3)):
        batch = rows_of(time)
        batch = batch._replace(weights=batch.weights * (torch.arange(time) >= prompt))
        close(gradient(params, batch, KEY), autograd_gradient(loss)(params, batch, KEY))
    assert counter.frame_count == 1


def test_a_compiled_step_that_donates_follows_the_eager_one():
    torch._dynamo.reset()
    apply, params = long_llama()
    loss, optimizer = policy_loss(apply, **POLICY), fused_adamw(0.01, **ADAM, max_norm=0.5)

    def compiled(loss):
        return compiled_gradient(loss, rows=2, time=40, backend="aot_eager")

    states = []
    for gradient in (autograd_gradient, compiled):
        state = train_state(frozen(params), optimizer)
        step = donating_step(loss, optimizer, microbatches=2, gradient=gradient)
        for time in (21, 40, 17):
            state, metrics = step(state, rows_of(time), KEY)
        states.append((state, metrics))
    close(*states)


def a_step(rows, time):
    case = CASES["reward"]
    compiled_gradient(case.loss, rows=rows, time=time)(case.params, batch_of(case.batch), KEY)


def a_rollout(rows, time):
    options = SimpleNamespace(layerwise=0, compile=1, dtype="float32", batch=rows, new_tokens=2)
    how = {"temperature": 1.0, "stop": (5,), "pad": 0}
    sampler(llama(), options, LM.params, width=time, **how)


@pytest.mark.parametrize("arrange", [a_step, pytest.param(a_rollout, marks=pytest.mark.slow)])
def test_no_code_is_taken_from_the_cache_that_was_arranged_by_other_sizes(
    arrange, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def taken(rows, time):
        torch._dynamo.reset()
        counters.clear()
        arrange(rows, time)
        found = (counters["aot_autograd"], counters["inductor"])
        return sum(n for each in found for name, n in each.items() if name.endswith("cache_hit"))

    assert taken(4, 9) == 0
    assert taken(4, 9) > 0
    assert taken(6, 12) == 0


@pytest.mark.parametrize("wrong", [{"rows": 1, "time": 8}, {"rows": 4, "time": 1}])
def test_a_size_that_would_be_compiled_in_is_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        compiled_gradient(CASES["sft"].loss, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("command, steps", [("sft", 7), ("grpo", 4)])
def test_a_compiled_run_that_was_killed_is_resumed_to_the_same_bits(
    small, tmp_path, command, steps
):
    words = (*runs.words_of(small, None)[command], "--compile", 1, "--dtype", "bfloat16")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main([str(word) for word in (*words, "--out", whole)]) == 0
    assert runs.kill(runs.start(*words, "--out", out), out, steps)
    assert main([str(word) for word in (*words, "--out", out, "--resume")]) == 0
    assert runs.bits(out) == runs.bits(whole)


def test_a_transform_of_torch_func_refuses_a_compiled_loss():
    case = CASES["sft"]
    loss = compiled_loss(case.loss, rows=4, time=9, backend="aot_eager")
    with pytest.raises(RuntimeError, match="functorch transform"):
        functional_gradient(loss)(case.params, batch_of(case.batch), KEY)
