"""Scans over time give the numbers of floor 0, whatever the mask, the shape and the layout."""

import cases_scans
import pytest
import rlhf_kernels as ours
import torch
from cases_scans import FUNCTIONS, MASKED, RATES, gradients, loop, outputs, path, trajectories
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import jvp

import rlhf_fn as floor

__all__ = ["path"]  # a fixture

each = pytest.mark.parametrize("name", FUNCTIONS)
each_masked = pytest.mark.parametrize("name", MASKED)
SHAPES = [(3, 21), (2, 3, 8), (4, 13), (3, 5), (3, 4), (7,), (1, 1), (0, 5), (3, 0)]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cut_off", [False, True])
def test_values_and_gradients_are_those_of_floor_0(name, shape, cut_off, path):
    torch.manual_seed(len(shape))
    tensors, mask, end = trajectories(*shape)
    case = name, tensors, mask, end if cut_off else None
    close(outputs(ours, *case), outputs(floor, *case))
    close(gradients(ours, *case), gradients(floor, *case))


def rates(draw, shape):
    """γ or λ as a number, as a tensor for all, one per row, or one per step."""
    sizes = st.sampled_from([None, (), (*shape[:-1], 1), (1,), shape])
    size, edge = draw(sizes), draw(st.sampled_from([0.0, 1.0, None]))
    if size is None:
        return draw(st.floats(0, 1)) if edge is None else edge
    return torch.rand(size).double() if edge is None else torch.full(size, edge).double()


@st.composite
def problems(draw):
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 11))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors, _, end = trajectories(*shape)
    rows = st.one_of(
        st.just([False] * shape[1]),
        st.just([True] * shape[1]),
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
    )
    mask = torch.tensor([draw(rows) for _ in range(shape[0])])
    changed = {"discount": rates(draw, shape), "lam": rates(draw, shape)}
    return tensors, mask, draw(st.sampled_from([None, end])), changed


@each_masked
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(problems())
def test_any_mask_and_any_rates_give_what_floor_0_gives(path, name, problem):
    tensors, mask, end, changed = problem
    changed = changed if name != "discounted_returns" else {"discount": changed["discount"]}
    case = name, tensors, mask, end
    close(outputs(ours, *case, **changed), outputs(floor, *case, **changed))
    close(gradients(ours, *case, **changed), gradients(floor, *case, **changed))


@each_masked
@pytest.mark.parametrize("size", [(), (4, 1), (4, 9)], ids=["all", "row", "step"])
def test_rates_may_be_of_all_rows_of_each_row_or_of_each_step(name, size, path):
    torch.manual_seed(0)
    case = name, *trajectories(4, 9)
    changed = {key: torch.rand(size).double() for key in ("discount", "lam")}
    changed = changed if name != "discounted_returns" else {"discount": changed["discount"]}
    close(outputs(ours, *case, **changed), outputs(floor, *case, **changed))
    close(gradients(ours, *case, **changed), gradients(floor, *case, **changed))


@each_masked
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_the_mask_hides_is_never_read(name, poison, path):
    torch.manual_seed(0)
    tensors, mask, end = trajectories(4, 13)
    dirty = [x.masked_fill(~mask, poison) for x in tensors]
    for run in (outputs, gradients):
        clean = run(ours, name, tensors, mask, end)
        torch.testing.assert_close(run(ours, name, dirty, mask, end), clean, rtol=0, atol=0)


@each_masked
def test_upstream_gradients_of_what_the_mask_hides_are_never_read(name, path):
    torch.manual_seed(0)
    tensors, mask, end = trajectories(4, 13)
    leaves = [x.requires_grad_() for x in tensors]
    outs = outputs(ours, name, leaves, mask, end)
    upstream = [torch.randn_like(out) for out in outs]
    poisoned = [g.masked_fill(~mask, torch.nan) for g in upstream]
    clean, dirty = (
        torch.autograd.grad(outs, leaves, g, retain_graph=True, materialize_grads=True)
        for g in (upstream, poisoned)
    )
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("discount, lam", [(1.0, 0.95), (0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_float32_is_as_near_to_the_float64_loop_as_floor_0(discount, lam, offset, path):
    torch.manual_seed(0)
    (rewards, values, *_), mask, end = trajectories(8, 61, dtype=torch.float32, offset=offset)
    options = {"discount": discount, "lam": lam, "bootstrap": end}
    exact = loop(rewards, values, mask, **options)
    got, plain = (m.gae(rewards, values, mask, **options) for m in (ours, floor))
    for mine, theirs, truth in zip(got, plain, exact):
        allowed = 1.5 * rms(theirs.double() - truth) + torch.finfo(torch.float32).eps * rms(truth)
        assert rms(mine.double() - truth) <= allowed


@each
@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_long_rows_are_scanned_whole(name, interpreted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    torch.manual_seed(0)
    case = name, *trajectories(2, 1500, hidden=0.1)
    for got, expected in zip(outputs(ours, *case), outputs(floor, *case)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_input_and_half_is_summed_in_float32(name, dtype, path):
    torch.manual_seed(0)
    tensors, mask, end = trajectories(4, 13, dtype=dtype)
    exact = outputs(floor, name, [x.double() for x in tensors], mask, end.double())
    for got, expected in zip(outputs(ours, name, tensors, mask, end), exact):
        assert got.dtype == dtype
        step = 8 if name == "vtrace" else 4 if name == "suffix_scan" else 2
        limits = {"rtol": step * torch.finfo(dtype).eps, "atol": 2 * step * torch.finfo(dtype).eps}
        torch.testing.assert_close(got.double(), expected, **limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rates_are_not_rounded_to_the_half_precision_of_rewards(dtype, path):
    torch.manual_seed(0)
    (rewards, values, *_), mask, end = trajectories(4, 13, dtype=dtype)
    rates = {"discount": torch.tensor(0.997), "lam": torch.full((4, 1), 0.951)}
    exact = loop(rewards, values, mask, end, discount=0.997, lam=0.951)
    got = ours.gae(rewards, values, mask, bootstrap=end, **rates)
    pushed = jvp(
        lambda r, v, b: ours.gae(r, v, mask, bootstrap=b, **rates),
        (rewards, values, end),
        (rewards, values, end),
    )[1]
    for out, tangent, expected in zip(got, pushed, exact):  # it is linear: its own tangent
        assert out.dtype == tangent.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=eps, atol=2 * eps)
        torch.testing.assert_close(tangent.double(), expected, rtol=eps, atol=2 * eps)


def layouts(x):
    """The same numbers, laid out in memory in other ways."""
    yield x.movedim(-1, 0).contiguous().movedim(0, -1)  # time first
    yield torch.stack([x, x.new_full(x.shape, 1)], -1)[..., 0]  # every other
    yield torch.cat([x[..., :1], x], -1)[..., 1:]  # one element in
    yield x.transpose(0, 1).contiguous().transpose(0, 1)  # no stride from row to row


@each
@pytest.mark.parametrize("which", range(4))
def test_any_layout_gives_the_same_bits(name, which, path):
    torch.manual_seed(0)
    tensors, mask, end = trajectories(2, 3, 5)
    other, (hidden,) = [list(layouts(x))[which] for x in tensors], [list(layouts(mask))[which]]
    for run in (outputs, gradients):
        expected = run(ours, name, tensors, mask, end)
        assert all(map(torch.equal, run(ours, name, other, hidden, end), expected))


def test_one_number_for_all_rows_may_be_expanded(path):
    torch.manual_seed(0)
    (rewards, *_), mask, _ = trajectories(4, 9)
    got = ours.gae(rewards, rewards.new_zeros(()).expand(4, 9), mask, **RATES)
    close(tuple(got), tuple(floor.gae(rewards, torch.zeros_like(rewards), mask, **RATES)))


X, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "values of another shape": (lambda m: m.gae(X, X[:, :2], MASK, **RATES), ValueError, "values"),
    "a mask of floats": (lambda m: m.gae(X, X, MASK.float(), **RATES), TypeError, "mask"),
    "rewards of integers": (
        lambda m: m.discounted_returns(X.long(), MASK, discount=1.0),
        TypeError,
        "rewards",
    ),
    "a discount beyond 1": (
        lambda m: m.discounted_returns(X, MASK, discount=1.1),
        ValueError,
        "discount",
    ),
    "a lam tensor below 0": (
        lambda m: m.gae(X, X, MASK, discount=1.0, lam=torch.tensor(-0.1)),
        ValueError,
        "lam",
    ),
    "a lam that is a bool": (lambda m: m.gae(X, X, MASK, discount=1.0, lam=True), TypeError, "lam"),
    "a lam that would broadcast": (
        lambda m: m.gae(X, X, MASK, discount=1.0, lam=torch.ones(5, 1, 1)),
        ValueError,
        "lam",
    ),
    "a bootstrap per step": (
        lambda m: m.gae(X, X, MASK, bootstrap=X, **RATES),
        ValueError,
        r"bootstrap \(2, 3\)",
    ),
    "a kept reward of NaN": (
        lambda m: m.discounted_returns(X / 0, MASK, discount=1.0),
        ValueError,
        r"rewards\[0, 0\] is nan",
    ),
    "a negative clip": (
        lambda m: m.vtrace(X, X, X, X, MASK, discount=1.0, clip_rho=-1.0, clip_c=1.0),
        ValueError,
        "clip_rho",
    ),
    "log-probs of another shape": (
        lambda m: m.vtrace(X, X[:1], X, X, MASK, discount=1.0, clip_rho=1.0, clip_c=1.0),
        ValueError,
        "old_logprobs",
    ),
    "a decay of another shape": (lambda m: m.suffix_scan(X, X[:1]), ValueError, "decay"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("module", [ours, floor], ids=["ours", "floor 0"])
def test_bad_input_is_named_as_floor_0_names_it(what, module):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call(module)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="devices differ"):
        ours.gae(X, X.to("meta"), MASK, **RATES)


def test_the_same_input_gives_the_same_bits(path):
    case = "gae", *cases_scans.trajectories(4, 33, dtype=torch.float32)
    assert all(map(torch.equal, outputs(ours, *case), outputs(ours, *case)))
