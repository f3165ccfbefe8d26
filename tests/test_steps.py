"""A step is a loss and an optimizer: what holds of every step."""

from typing import NamedTuple

import pytest
import torch
from cases_steps import CASES, KEY, LM, OPTIMIZER, TIME, WEIGHTINGS, batch_of, real
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from rlhf_fn import random, tree
from rlhf_fn.batches import MARKS
from rlhf_fn.optim import sgd
from rlhf_fn.steps import (
    SftBatch,
    autograd_gradient,
    functional_gradient,
    gradient_step,
    of_asked,
    train_state,
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("microbatches", [2, 3, 4, 9])
def test_a_step_does_not_depend_on_how_its_batch_is_split(case, weighting, microbatches):
    batch, state = batch_of(case.batch, weighting), train_state(case.params, OPTIMIZER)
    whole = gradient_step(case.loss, OPTIMIZER)(state, batch, KEY)
    split = gradient_step(case.loss, OPTIMIZER, microbatches=microbatches)(state, batch, KEY)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(split[0], whole[0], rtol=1e-6, atol=1e-9)


@settings(max_examples=20)
@given(st.integers(1, 7), st.integers(1, 9))
def test_every_row_is_used_once_whatever_the_number_of_parts(rows, microbatches):
    class Batch(NamedTuple):
        x: torch.Tensor

    def loss(params, batch, key):
        total = (params["w"] * batch.x).sum()
        return total, {"rows": batch.x.new_tensor(len(batch.x)), "loss": total}

    optimizer, x = sgd(1.0), real(rows)
    state = train_state({"w": torch.ones((), dtype=torch.float64)}, optimizer)
    new, metrics = gradient_step(loss, optimizer, microbatches=microbatches)(state, Batch(x), KEY)
    assert metrics["rows"] == rows
    torch.testing.assert_close(new.params["w"], 1 - x.sum())
    assert new.step == 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_leaves_its_arguments_untouched(case, microbatches):
    batch, state = batch_of(case.batch), train_state(case.params, OPTIMIZER)
    before = tree.map(torch.clone, (state, batch, KEY))
    gradient_step(case.loss, OPTIMIZER, microbatches=microbatches)(state, batch, KEY)
    torch.testing.assert_close((state, batch, KEY), before, rtol=0, atol=0)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_both_gradients_are_the_same_numbers_and_carry_no_graph(case, microbatches):
    batch, state = batch_of(case.batch), train_state(case.params, OPTIMIZER)
    steps = [
        gradient_step(case.loss, OPTIMIZER, microbatches=microbatches, gradient=gradient)
        for gradient in (functional_gradient, autograd_gradient)
    ]
    one, two = (step(state, batch, KEY) for step in steps)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    assert not any(x.requires_grad for result in (one, two) for x in tree.leaves(result))


@pytest.mark.parametrize("prompt", range(8))
def test_what_no_row_asks_about_is_cut_from_a_batch_and_changes_no_number(case, prompt):
    batch = without_first(batch_of(case.batch), prompt)
    whole = autograd_gradient(case.loss)(case.params, batch, KEY)
    seen = []

    def spied(loss):
        return lambda *args: seen.append(args[1]) or autograd_gradient(loss)(*args)

    torch.testing.assert_close(
        of_asked(spied)(case.loss)(case.params, batch, KEY), whole, rtol=1e-9, atol=1e-12
    )
    for name, x in seen[0]._asdict().items():
        left = {"tokens": 0, "attention": 0}.get(name, min(prompt, TIME - 2))
        assert x.shape[-1] == getattr(batch, name).shape[-1] - left * (x.ndim > 1), name


def without_first(batch, prompt):
    """Nothing is asked about before the token `prompt`, but about that one in the first row."""
    marks = {n: x for n, x in batch._asdict().items() if n in MARKS and x.ndim > 1}
    later = torch.arange(TIME) >= prompt
    marks = {n: torch.where(later, x, torch.zeros_like(x)) for n, x in marks.items()}
    for name, x in marks.items():
        x[0, ..., prompt : prompt + 1] = True if name == "mask" else 0.25
    return batch._replace(**marks)


@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
def test_a_parameter_that_a_loss_does_not_use_stays(gradient):
    optimizer, unused = sgd(0.1), real(3)
    state = train_state({"w": real(3), "unused": unused}, optimizer)
    step = gradient_step(lambda p, batch, key: (p["w"].sum(), {}), optimizer, gradient=gradient)
    assert torch.equal(step(state, (real(2),), KEY)[0].params["unused"], unused)


def test_metrics_carry_no_graph_even_from_parameters_that_require_gradients(case):
    params = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    batch, state = batch_of(case.batch), train_state(params, OPTIMIZER)
    for gradient in (functional_gradient, autograd_gradient):
        _, metrics = gradient_step(case.loss, OPTIMIZER, gradient=gradient)(state, batch, KEY)
        assert not any(x.requires_grad for x in metrics.values())


def test_a_step_vmaps_over_a_population(case):
    batch, step = batch_of(case.batch), gradient_step(case.loss, OPTIMIZER, microbatches=2)
    states = [train_state(case.params, OPTIMIZER)]
    states.append(step(states[0], batch, KEY)[0])
    population = tree.map(lambda *x: torch.stack(x), *states)
    many = vmap(step, in_dims=(0, None, None))(population, batch, KEY)
    for i, state in enumerate(states):
        each = tree.map(lambda x, i=i: x[i], many)
        torch.testing.assert_close(each, step(state, batch, KEY), rtol=1e-6, atol=1e-9)


def test_per_row_gradients_add_up_to_the_batch_gradient(case):
    batch = batch_of(case.batch)
    alone = tree.map(lambda x: x[:, None], batch)
    each, _ = vmap(grad(case.loss, has_aux=True), in_dims=(None, 0, None))(case.params, alone, KEY)
    whole, _ = grad(case.loss, has_aux=True)(case.params, batch, KEY)
    torch.testing.assert_close(tree.map(lambda x: x.sum(0), each), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.compile
def test_a_compiled_step_is_one_graph_and_agrees_with_eager():
    agrees_with_eager(CASES["policy"], "aot_eager", 1)


@pytest.mark.slow
@pytest.mark.compile
def test_every_compiled_step_is_one_graph_and_agrees_with_eager(case):
    agrees_with_eager(case, "aot_eager", 2)


@pytest.mark.slow
@pytest.mark.compile
def test_a_step_of_generated_code_agrees_with_eager():
    agrees_with_eager(CASES["policy"], "inductor", 1)


def agrees_with_eager(case, backend, microbatches):
    torch._dynamo.reset()
    batch, state = batch_of(case.batch), train_state(case.params, OPTIMIZER)
    step = gradient_step(case.loss, OPTIMIZER, microbatches=microbatches)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    fused, eager = compiled(state, batch, KEY), step(state, batch, KEY)
    # Llama's norms are float32 in a float64 model, and Adam's first step magnifies small gradients
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_counted_and_the_old_state_stays(case):
    batch, state = batch_of(case.batch), train_state(case.params, OPTIMIZER)
    name = next(n for n in case.params if "norm" in n)
    broken = train_state(case.params | {name: case.params[name] * torch.inf}, OPTIMIZER)
    for microbatches in (1, 3):
        step = gradient_step(case.loss, OPTIMIZER, microbatches=microbatches)
        assert step(state, batch, KEY)[1]["finite"] == 1
        assert step(broken, batch, KEY)[1]["finite"] == 0


def test_a_loss_that_is_not_finite_is_counted_under_a_finite_gradient():
    def loss(params, batch, key):
        return params["w"] - batch[0].log().sum(), {}

    state = train_state({"w": torch.zeros(())}, OPTIMIZER)
    _, metrics = gradient_step(loss, OPTIMIZER)(state, (torch.zeros(2),), KEY)
    assert metrics["grad/norm"] == 1 and metrics["finite"] == 0


def test_a_gradient_that_is_not_finite_is_counted_under_a_finite_loss():
    def loss(params, batch, key):
        total = (params["w"] * batch[0]).sum().sqrt()  # 0, with an infinite slope
        return total, {"loss": total}

    state = train_state({"w": torch.zeros(())}, OPTIMIZER)
    _, metrics = gradient_step(loss, OPTIMIZER)(state, (torch.ones(2),), KEY)
    assert metrics["loss"] == 0 and metrics["finite"] == 0


def test_every_part_of_a_batch_has_its_own_key():
    def loss(params, batch, key):
        return params["w"] * 0, {"seen": random.uniform(key)}

    state = train_state({"w": torch.zeros(())}, OPTIMIZER)
    step = gradient_step(loss, OPTIMIZER, microbatches=3)
    expected = sum(random.uniform(random.fold_in(KEY, i)) for i in range(3))
    torch.testing.assert_close(step(state, (torch.ones(3),), KEY)[1]["seen"], expected)


def test_a_wrong_split_raises_and_names_the_fields():
    loss, state = CASES["sft"].loss, train_state(LM.params, OPTIMIZER)
    with pytest.raises(ValueError, match="microbatches must be at least 1, got 0"):
        gradient_step(loss, OPTIMIZER, microbatches=0)
    with pytest.raises(TypeError, match="microbatches must be an int|Type-check error"):
        gradient_step(loss, OPTIMIZER, microbatches=2.0)
    batch = batch_of(SftBatch)
    for wrong in (batch._replace(weights=batch.weights[1:]), SftBatch(*(x[:0] for x in batch))):
        with pytest.raises(ValueError, match="tokens .* attention .* weights"):
            gradient_step(loss, OPTIMIZER)(state, wrong, KEY)
