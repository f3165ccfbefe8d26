"""A step that writes over its state: the bits of its pure twin, the numbers of the formula."""

import math

import pytest
import torch
from cases_steps import CASES, KEY, batch_of
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn import tree
from rlhf_fn.fused import fused_adamw
from rlhf_fn.optim import adamw, chain, clip_by_global_norm, cosine_schedule
from rlhf_fn.steps import (
    donating_step,
    functional_gradient,
    gradient_step,
    on_copies,
    train_state,
)

ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
RATE = cosine_schedule(0.02, steps=9, warmup=2)
CLIPPED = fused_adamw(RATE, **ADAM, max_norm=0.3)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def copied(state):
    return tree.map(torch.clone, state)


def same_bits(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def leaves(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (5, 7), "b": (3,), "number": (), "none": (0, 4)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def written(optimizer, params, all_grads):
    params = copied(params)
    state = optimizer.init(params)
    for grads in all_grads:
        made = torch.tensor(True)
        optimizer.write(copied(grads), state, params, tree.global_norm(grads), made)
    return params, state


def updated(optimizer, params, all_grads):
    state = optimizer.init(params)
    for grads in all_grads:
        updates, state = optimizer.update(grads, state, params)
        params = tree.add(params, updates)
    return params, state


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@given(
    st.floats(1e-5, 0.1), st.floats(0, 0.99), st.floats(0.5, 0.999), st.floats(0, 1),
    st.sampled_from([0.3, 3.0, 100.0, math.inf]),
)  # fmt: skip
def test_what_is_written_is_the_formula(dtype, near, lr, b1, b2, weight_decay, max_norm):
    params, all_grads = leaves(dtype), [leaves(dtype, seed) for seed in range(1, 6)]
    settings = {"b1": b1, "b2": b2, "eps": 1e-3, "weight_decay": weight_decay}
    clip = chain() if max_norm == math.inf else clip_by_global_norm(max_norm)
    new, state = written(fused_adamw(lr, **settings, max_norm=max_norm), params, all_grads)
    expected, (_, moments) = updated(chain(clip, adamw(lr, **settings)), params, all_grads)
    torch.testing.assert_close(new, expected, rtol=near, atol=near)
    torch.testing.assert_close(state, moments, rtol=5 * near, atol=near)


def test_a_donating_step_follows_the_formula(case):
    batch = batch_of(case.batch)
    formula = chain(clip_by_global_norm(0.3), adamw(RATE, **ADAM))
    pure = gradient_step(case.loss, formula, microbatches=2)
    step = donating_step(case.loss, CLIPPED, microbatches=2)
    one, two = train_state(copied(case.params), CLIPPED), train_state(case.params, formula)
    for _ in range(4):
        (one, metrics), (two, expected) = step(one, batch, KEY), pure(two, batch, KEY)
        torch.testing.assert_close(metrics, expected, rtol=1e-6, atol=1e-9)
    # Llama's norms are float32 in a float64 model
    torch.testing.assert_close(one.params, two.params, rtol=1e-6, atol=1e-9)
    assert one.step == two.step == one.opt_state.count == 4


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_donating_step_has_the_bits_of_its_pure_twin_and_writes_them_in_place(case, microbatches):
    batch = batch_of(case.batch)
    step = donating_step(case.loss, CLIPPED, microbatches=microbatches)
    start = train_state(copied(case.params), CLIPPED)
    before, state, pure = copied(start), start, start
    twin = on_copies(step)
    history = []
    for _ in range(3):
        pure, metrics = twin(pure, batch, KEY)
        history.append((pure, metrics))
    same_bits(start, before)  # the twin wrote nowhere
    where = [x.data_ptr() for x in tree.leaves(state)]
    for expected in history:
        state, metrics = step(state, batch, KEY)
        same_bits((state, metrics), expected)
    assert [x.data_ptr() for x in tree.leaves(state)] == where
    same_bits(start, state)  # the old name speaks of the new state, all of it


def test_a_donating_step_writes_to_nothing_but_its_state(case):
    batch, state = batch_of(case.batch), train_state(copied(case.params), CLIPPED)
    before = copied((batch, KEY, case.params))
    donating_step(case.loss, CLIPPED)(state, batch, KEY)
    same_bits((batch, KEY, case.params), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_every_bit_as_it_was(case, bad):
    batch, step = batch_of(case.batch), donating_step(case.loss, CLIPPED, microbatches=2)
    state, _ = step(train_state(copied(case.params), CLIPPED), batch, KEY)
    before = copied(state)
    broken = batch._replace(weights=batch.weights * bad)
    state, metrics = step(state, broken, KEY)
    assert metrics["finite"] == 0
    same_bits(state, before)
    state, metrics = step(state, batch, KEY)
    assert metrics["finite"] == 1 and state.step == 2
    assert not torch.equal(*(next(iter(s.params.values())) for s in (state, before)))


def test_a_finite_loss_with_a_gradient_that_is_not_is_refused_too():
    def loss(params, batch, key):
        total = (params["w"] * batch[0]).sum().sqrt()  # 0, with an infinite slope
        return total, {"loss": total}

    optimizer = fused_adamw(0.1, **ADAM)
    state = train_state({"w": torch.zeros(())}, optimizer)
    state, metrics = donating_step(loss, optimizer)(state, (torch.ones(2),), KEY)
    assert metrics["finite"] == 0
    same_bits(state, train_state({"w": torch.zeros(())}, optimizer))


def test_an_update_that_is_not_accepted_leaves_every_bit_and_still_reports(case):
    batch = batch_of(case.batch)
    step = donating_step(case.loss, CLIPPED, accept=lambda metrics: metrics["loss"] > 1e9)
    state = train_state(copied(case.params), CLIPPED)
    before = copied(state)
    state, metrics = step(state, batch, KEY)
    same_bits(state, before)
    expected = donating_step(case.loss, CLIPPED)(state, batch, KEY)[1]
    same_bits(metrics, expected)
    assert metrics["finite"] == 1


@pytest.mark.parametrize("max_norm", [0.1, math.inf])
@pytest.mark.parametrize("gradient", [None, functional_gradient])
def test_gradients_that_share_memory_or_have_none_of_their_own_count_once_each(max_norm, gradient):
    """autograd returns one tensor for a and b, and one number, expanded, for c."""

    def loss(params, batch, key):
        total = ((params["a"] + params["b"]) * batch[0]).square().sum() + params["c"].sum()
        return total, {}

    batch = (torch.linspace(1, 2, 300).double(),)
    params = {name: torch.full((300,), x).double() for name, x in (("a", 1), ("b", 2), ("c", 3))}
    optimizer = fused_adamw(0.1, **ADAM, max_norm=max_norm)
    clip = chain() if max_norm == math.inf else clip_by_global_norm(max_norm)
    formula = chain(clip, adamw(0.1, **ADAM))
    expected = gradient_step(loss, formula)(train_state(params, formula), batch, KEY)[0].params
    options = {} if gradient is None else {"gradient": gradient}
    state = train_state(copied(params), optimizer)
    new = donating_step(loss, optimizer, **options)(state, batch, KEY)[0].params
    torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-12)


def test_parameters_of_different_dtypes_are_each_written_in_their_own():
    params = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(1)}
    grads = tree.map(lambda p: p * 7, params)
    new, state = written(fused_adamw(0.1, **ADAM, max_norm=1.0), params, [grads])
    formula = chain(clip_by_global_norm(1.0), adamw(0.1, **ADAM))
    torch.testing.assert_close(new, updated(formula, params, [grads])[0])
    assert [p.dtype for p in new.values()] == [p.dtype for p in params.values()]


def peak(call):
    """Bytes that a call holds at most beyond what there was."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


def test_a_donating_step_holds_the_gradients_and_no_more_as_a_module_with_torch_optim():
    params = {str(i): torch.randn(256, 256) for i in range(6)}
    x = torch.randn(1, 256)

    def loss(params, batch, key):
        h = batch[0]
        for p in params.values():
            h = torch.tanh(h @ p)
        return h.square().sum(), {}

    state = train_state(params, CLIPPED)
    step = donating_step(loss, CLIPPED)
    modules = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = torch.optim.AdamW(modules.values(), 1e-3, fused=True)

    def theirs():
        loss(modules, (x,), KEY)[0].backward()
        torch.nn.utils.clip_grad_norm_(modules.values(), 0.3)
        optimizer.step()
        optimizer.zero_grad()

    step(state, (x,), KEY), theirs()
    ours = peak(lambda: step(state, (x,), KEY))
    assert ours <= 1.01 * peak(theirs)
    assert ours < 1.1 * sum(p.nbytes for p in params.values())


def test_what_the_kernel_would_misread_is_named():
    with pytest.raises(TypeError, match=r"bfloat16, \(2, 3\); keep it in float32"):
        CLIPPED.init({"w": torch.zeros(2, 3, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match=r"\(3, 2\) with strides \(1, 3\)"):
        CLIPPED.init({"w": torch.zeros(2, 3).t()})
    with pytest.raises(ValueError, match="max_norm"):
        fused_adamw(0.1, **ADAM, max_norm=-1.0)
    with pytest.raises(ValueError, match="params has no leaves"):
        CLIPPED.init({})
    with pytest.raises(ValueError, match="microbatches"):
        donating_step(CASES["sft"].loss, CLIPPED, microbatches=0)
