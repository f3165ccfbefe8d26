"""Optimizers against torch.optim, schedules against their closed form, and what transforms keep."""

import math

import pytest
import torch
import torch._dynamo.testing
from cases_ground import array
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from rlhf_fn import tree
from rlhf_fn.optim import adamw, chain, clip_by_global_norm, cosine_schedule, linear_schedule, sgd

ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": adamw(0.01, **ADAM),
    "sgd": sgd(0.01, momentum=0.9),
    "clipped, scheduled": chain(
        clip_by_global_norm(1.0), adamw(cosine_schedule(0.01, steps=9, warmup=2), **ADAM)
    ),
}


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    params = {"w": torch.randn(4, 3, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
    grads = [tree.map(torch.randn_like, params) for _ in range(6)]
    return params, [
        g | {"b": torch.zeros_like(g["b"])} if i < 2 else g for i, g in enumerate(grads)
    ]


def run(optimizer, params, grads):
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = tree.add(params, updates)
    return params, state


def run_torch(make, params, grads, *, max_norm=None, lr=None):
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = make(list(leaves.values()))
    for i, g in enumerate(grads):
        for name, p in leaves.items():
            p.grad = g[name].clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), max_norm)
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(i)
        optimizer.step()
    return tree.stop(leaves)


rates = st.floats(1e-5, 1.0)


@given(rates, st.floats(0, 0.99), st.floats(0, 0.9999), st.floats(1e-10, 1e-2), st.floats(0, 1))
def test_adamw_is_torch_adamw(lr, b1, b2, eps, weight_decay):
    params, grads = problem()
    ours = adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    expected = run_torch(
        lambda p: torch.optim.AdamW(p, lr, (b1, b2), eps, weight_decay), params, grads
    )
    torch.testing.assert_close(run(ours, params, grads)[0], expected, rtol=1e-11, atol=1e-11)


def test_adamw_in_float32_is_as_near_to_float64_as_torch_is():
    params, grads = problem(torch.float32)
    grads = grads * 160
    ours = adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    exact = run(ours, *tree.map(torch.Tensor.double, (params, grads)))[0]
    theirs = run_torch(lambda p: torch.optim.AdamW(p, 1e-3, (0.9, 0.999), 1e-8, 0.1), params, grads)

    def error(result):
        return tree.global_norm(tree.map(lambda x, y: x - y, result, exact))

    assert error(run(ours, params, grads)[0]) < 2 * error(theirs) < 2e-4


@given(rates, st.floats(0, 0.99))
def test_sgd_is_torch_sgd(lr, momentum):
    params, grads = problem()
    expected = run_torch(lambda p: torch.optim.SGD(p, lr, momentum), params, grads)
    ours = run(sgd(lr, momentum=momentum), params, grads)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_is_torch_clip_grad_norm(max_norm, size):
    params, grads = problem()
    grads = [tree.scale(g, size) for g in grads]
    expected = run_torch(lambda p: torch.optim.SGD(p, 1.0), params, grads, max_norm=max_norm)
    ours = run(chain(clip_by_global_norm(max_norm), sgd(1.0)), params, grads)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-9)


@given(st.floats(1e-3, 1e3), array(2, 3))
def test_clipping_bounds_the_norm_and_keeps_the_direction(max_norm, x):
    clipped, _ = clip_by_global_norm(max_norm).update({"x": x}, (), {})
    assert tree.global_norm(clipped) <= max_norm * (1 + 1e-12)
    if tree.global_norm({"x": x}) < 0.99 * max_norm:
        torch.testing.assert_close(clipped["x"], x, rtol=0, atol=0)
    cosine = torch.cosine_similarity(clipped["x"].flatten(), x.flatten(), dim=0)
    assert cosine > 1 - 1e-9 or x.abs().max() < 1e-6


SHAPES = {
    "linear": (linear_schedule, lambda x: 1 - x),
    "cosine": (cosine_schedule, lambda x: (1 + math.cos(math.pi * x)) / 2),
}


@pytest.mark.parametrize("name", SHAPES)
@given(st.data())
def test_a_schedule_is_its_closed_form(name, data):
    make, shape = SHAPES[name]
    warmup = data.draw(st.integers(0, 5))
    steps = data.draw(st.integers(warmup + 1, 12))
    peak, end = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    schedule = make(peak, steps=steps, warmup=warmup, end=end)
    for step in range(steps + 4):
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = end + (peak - end) * shape(min(1.0, (step - warmup) / (steps - warmup)))
        assert float(schedule(torch.tensor(step))) == pytest.approx(expected, abs=1e-12)
    many = torch.arange(steps + 4)
    torch.testing.assert_close(vmap(schedule)(many), torch.stack([schedule(s) for s in many]))


@pytest.mark.parametrize("name", SHAPES)
def test_a_schedule_is_the_one_that_trainers_use(name):
    hf = pytest.importorskip("transformers.optimization")
    make = getattr(hf, f"get_{name}_schedule_with_warmup")
    theirs = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3), 3, 11)
    ours = SHAPES[name][0](0.3, steps=11, warmup=3)
    for step in range(12):  # their cosine rises again past the end
        assert float(ours(torch.tensor(step))) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda lr: adamw(lr, **ADAM), lambda p: torch.optim.AdamW(p, 1.0, (0.9, 0.95), 1e-8, 0.1)),
        (lambda lr: sgd(lr, momentum=0.9), lambda p: torch.optim.SGD(p, 1.0, 0.9)),
    ],
)
def test_an_optimizer_asks_its_schedule_for_the_number_of_updates_before(ours, theirs):
    params, grads = problem()
    schedule = linear_schedule(0.1, steps=6, warmup=2)
    expected = run_torch(theirs, params, grads, lr=lambda i: float(schedule(torch.tensor(i))))
    result = run(ours(schedule), params, grads)[0]
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_writes_to_none_of_its_arguments(name):
    params, grads = problem()
    state = OPTIMIZERS[name].update(grads[2], OPTIMIZERS[name].init(params), params)[1]
    before = tree.map(torch.clone, (grads[3], state, params))
    OPTIMIZERS[name].update(grads[3], state, params)
    torch.testing.assert_close((grads[3], state, params), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_its_own_vmap(name):
    update = OPTIMIZERS[name].update
    params, grads = problem(torch.float32)
    runs = [run(OPTIMIZERS[name], params, grads[i:]) for i in range(3)]
    cases = [(grads[i], state, params) for i, (params, state) in enumerate(runs)]
    stack = lambda *xs: torch.stack(xs)  # noqa: E731
    torch.testing.assert_close(
        vmap(update)(*tree.map(stack, *cases)), tree.map(stack, *[update(*case) for case in cases])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sweep_over_hyperparameters_is_a_vmap(dtype):
    params, grads = problem(dtype)

    def final(lr, b2, max_norm):
        optimizer = adamw(lr, b1=0.9, b2=b2, eps=1e-8, weight_decay=0.1)
        return run(chain(clip_by_global_norm(max_norm), optimizer), params, grads)[0]

    sweep = torch.tensor([[0.1, 0.9, 1.0], [0.01, 0.99, 2.0], [0.001, 0.5, 0.1]]).unbind(-1)
    each = [final(*(float(x) for x in row)) for row in zip(*sweep)]
    together = vmap(final)(*sweep)
    torch.testing.assert_close(together, tree.map(lambda *xs: torch.stack(xs), *each))


def test_a_run_can_be_differentiated_even_through_gradients_that_are_zero():
    params, grads = problem()

    def loss(lr, momentum):
        used = [tree.map(lambda x: x * lr.exp(), g) for g in grads]  # the moments depend on lr too
        params_a = run(adamw(lr, **ADAM), params, used)[0]
        return tree.global_norm((params_a, run(sgd(lr, momentum=momentum), params, used)[0]))

    point = (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in point])
    assert grad(loss)(*point).isfinite()


@pytest.mark.compile
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_compiles_to_one_graph(name):
    optimizer = OPTIMIZERS[name]
    params, grads = problem()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = optimizer._replace(
        update=torch.compile(optimizer.update, fullgraph=True, backend=counter)
    )
    torch.testing.assert_close(run(compiled, params, grads), run(optimizer, params, grads))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_update_leaf_by_leaf_has_the_same_bits(name):
    optimizer = OPTIMIZERS[name]
    params, grads = problem()
    whole = run(optimizer, params, grads)[0]
    for leaf in params:
        alone = run(optimizer, {leaf: params[leaf]}, [{leaf: g[leaf]} for g in grads])[0]
        assert torch.equal(alone[leaf], whole[leaf])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_updates_have_the_dtype_of_the_parameters_and_moments_at_least_float32(name, dtype):
    params, grads = problem(dtype)
    updates, state = OPTIMIZERS[name].update(grads[0], OPTIMIZERS[name].init(params), params)
    assert {u.dtype for u in tree.leaves(updates)} == {dtype}
    moments = {x.dtype for x in tree.leaves(state) if x.is_floating_point()}
    assert moments == {torch.promote_types(dtype, torch.float32)}


def test_half_precision_parameters_get_the_float32_update_rounded_once():
    params, grads = problem(torch.bfloat16)
    wide = tree.map(lambda x: x.float(), (params, grads))
    for optimizer in (OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]):
        state, wide_state = optimizer.init(params), optimizer.init(wide[0])
        for g, h in zip(grads, wide[1]):
            updates, state = optimizer.update(g, state, params)
            expected, wide_state = optimizer.update(h, wide_state, wide[0])
            assert all(torch.equal(updates[k], expected[k].bfloat16()) for k in params)


def test_no_transforms_in_a_chain_are_the_gradient_itself():
    params, grads = problem()
    assert chain().update(grads[0], chain().init(params), params) == (grads[0], ())


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("call", "names"),
    [
        *[(lambda lr=lr: adamw(lr, **ADAM), "lr") for lr in (nan, inf, -1.0, torch.tensor(nan))],
        *[(lambda lr=lr: sgd(lr), "lr") for lr in (nan, -1e-9, torch.tensor(-1.0))],
        *[(lambda b=b: adamw(0.1, **ADAM | {"b1": b}), "b1") for b in (1.0, -0.1, nan)],
        *[(lambda b=b: adamw(0.1, **ADAM | {"b2": b}), "b2") for b in (1.0, -0.1, nan)],
        *[(lambda e=e: adamw(0.1, **ADAM | {"eps": e}), "eps") for e in (0.0, -1.0, nan)],
        *[(lambda w=w: adamw(0.1, **ADAM | {"weight_decay": w}), "weight") for w in (-1.0, nan)],
        *[(lambda m=m: sgd(0.1, momentum=m), "momentum") for m in (1.0, -0.1, nan)],
        *[(lambda m=m: clip_by_global_norm(m), "max_norm") for m in (0.0, -1.0, nan, inf)],
        (lambda: linear_schedule(nan, steps=3), "peak"),
        (lambda: cosine_schedule(0.1, steps=3, end=-1.0), "end"),
        (lambda: cosine_schedule(0.1, steps=3, warmup=3), "steps"),
        (lambda: linear_schedule(0.1, steps=3, warmup=-1), "warmup"),
        (lambda: adamw(0.1, **ADAM).init({}), "params"),
    ],
)
def test_a_bad_hyperparameter_is_named(call, names):
    with pytest.raises(ValueError, match=names):
        call()


@pytest.mark.parametrize("bad", [True, "0.1", None])
def test_a_learning_rate_that_is_no_number_is_a_type_error(bad):
    with pytest.raises(TypeError, match="lr"):
        adamw(bad, **ADAM)


def test_a_state_of_another_optimizer_does_not_pass():
    params, grads = problem()
    with pytest.raises(ValueError):
        chain(sgd(0.1), sgd(0.1)).update(grads[0], chain(sgd(0.1)).init(params), params)
