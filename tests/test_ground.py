"""The scan, the weights, trees and checks: laws, and oracles that are slow loops."""

import math
from typing import NamedTuple

import pytest
import torch
from cases_ground import array, masks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from rlhf_fn import tree
from rlhf_fn import weights as w
from rlhf_fn.scan import suffix_scan

close = torch.testing.assert_close
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9))
ragged = shapes.flatmap(lambda shape: masks(*shape))
grouped = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
REDUCTIONS = {
    "token_mean": w.token_mean,
    "sequence_mean": w.sequence_mean,
    "sequence_sum": w.sequence_sum,
    "token_sum": w.token_sum,
    "fixed_length": lambda mask, **kw: w.fixed_length(mask, length=9, **kw),
    "group_mean": w.group_mean,
}


@given(shapes.flatmap(lambda s: st.tuples(array(*s), array(*s))))
def test_suffix_scan_is_the_loop_from_the_end(inputs):
    x, decay = inputs
    y, after = torch.empty_like(x), torch.zeros(len(x), dtype=x.dtype)
    for t in reversed(range(x.shape[-1])):
        after = y[:, t] = x[:, t] + decay[:, t] * after
    close(suffix_scan(x, decay), y, rtol=1e-9, atol=1e-6)
    great = torch.full((1, 2), 1e200, dtype=torch.float64)  # log₂ time passes, not one product more
    assert suffix_scan(great / great, great).isfinite().all()


@given(shapes.flatmap(lambda s: array(*s)))
def test_suffix_scan_without_decay_is_the_sum_of_the_suffix(x):
    expected = x.flip(-1).cumsum(-1).flip(-1)
    close(suffix_scan(x, torch.ones_like(x)), expected)
    close(suffix_scan(x, torch.zeros_like(x)), x, rtol=0, atol=0)
    assert suffix_scan(x[:, :0], x[:, :0]).shape == (len(x), 0)


@given(ragged)
def test_token_mean_weighs_every_kept_token_the_same(mask):
    kept = max(1, int(mask.sum()))
    expected = torch.tensor([[float(m) / kept for m in row] for row in mask.tolist()])
    close(w.token_mean(mask), expected)


@given(ragged)
def test_sequence_mean_is_the_mean_over_rows_of_the_mean_over_tokens(mask):
    rows = max(1, sum(any(row) for row in mask.tolist()))
    expected = [[float(m) / max(1, sum(row)) / rows for m in row] for row in mask.tolist()]
    close(w.sequence_mean(mask), torch.tensor(expected))


@given(ragged, st.integers(1, 50))
def test_fixed_length_is_one_constant_on_every_kept_token(mask, length):
    rows = max(1, sum(any(row) for row in mask.tolist()))
    close(w.fixed_length(mask, length=length), mask.float() / (rows * length))
    with pytest.raises(ValueError, match="length must be at least 1"):
        w.fixed_length(mask, length=0)


@given(ragged)
def test_sums_weigh_every_kept_token_the_same_whatever_the_lengths(mask):
    rows = max(1, sum(any(row) for row in mask.tolist()))
    close(w.sequence_sum(mask), mask.float() / rows)
    close(w.token_sum(mask), mask.float(), rtol=0, atol=0)


@given(grouped.flatmap(lambda s: masks(*s)))
def test_group_mean_is_the_mean_over_prompts_of_their_token_means(mask):
    prompts = max(1, sum(bool(group.any()) for group in mask))
    close(w.group_mean(mask), torch.stack([w.token_mean(group) for group in mask]) / prompts)


@pytest.mark.parametrize("name", REDUCTIONS)
@given(st.data())
def test_rows_and_tokens_that_are_padding_change_no_weight(name, data):
    mask = data.draw(shapes.flatmap(lambda s: masks(2, *s)))
    weights = REDUCTIONS[name](mask)
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    if name.endswith("_mean"):
        close(weights.sum(), mask.any().float())
    wider = REDUCTIONS[name](torch.nn.functional.pad(mask, (3, 2)))
    close(wider[..., 3:-2], weights, rtol=0, atol=0)
    longer = REDUCTIONS[name](torch.cat([mask, torch.zeros_like(mask)]))
    close(longer[:2], weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_are_exact_in_the_dtype_asked_for(name, dtype):
    mask = torch.arange(21).reshape(1, 3, 7) % 3 > 0
    exact = REDUCTIONS[name](mask, dtype=torch.float64)
    weights = REDUCTIONS[name](mask, dtype=dtype)
    assert weights.dtype == dtype and REDUCTIONS[name](mask).dtype == torch.float32
    close(weights.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.compile
@pytest.mark.parametrize("name", REDUCTIONS)
def test_weights_compile_to_one_graph(name):
    mask = torch.arange(21).reshape(1, 3, 7) % 3 > 0
    torch._dynamo.reset()
    compiled = torch.compile(REDUCTIONS[name], fullgraph=True, backend="aot_eager")
    close(compiled(mask), REDUCTIONS[name](mask))


@given(ragged.flatmap(lambda m: st.tuples(st.just(m), array(*m.shape))), st.sampled_from("ni"))
def test_weighted_sum_never_reads_where_the_weight_is_zero(inputs, kind):
    mask, x = inputs
    weights = w.sequence_mean(mask, dtype=x.dtype) * (-1 if kind == "n" else 1)
    poisoned = torch.where(mask, x, torch.nan if kind == "n" else torch.inf)
    expected = sum(a * b for a, b in zip(x[mask].tolist(), weights[mask].tolist()))
    close(w.weighted_sum(poisoned, weights).item(), float(expected))
    dx, dw = grad(w.weighted_sum, argnums=(0, 1))(poisoned, weights)
    close(dx, weights, rtol=0, atol=0)
    close(dw, torch.where(mask, x, 0.0), rtol=0, atol=0)


@given(ragged.flatmap(lambda m: st.tuples(st.just(m), array(*m.shape))), st.integers(1, 4))
def test_a_weighted_sum_does_not_depend_on_how_the_batch_is_split(inputs, parts):
    mask, x = inputs
    weights = w.token_mean(mask, dtype=x.dtype)
    pieces = zip(x.chunk(parts), weights.chunk(parts))
    close(sum(w.weighted_sum(*piece) for piece in pieces), w.weighted_sum(x, weights))


class Pair(NamedTuple):
    first: Tensor
    second: dict


def forest(x):
    return Pair(x, {"b": [x + 1], "a": (2 * x, {})})


@given(array(2, 3), array(2, 3))
def test_trees_keep_their_structure_and_meet_leaf_by_leaf(x, y):
    added = tree.add(forest(x), forest(y))
    assert type(added) is Pair and list(added.second) == ["b", "a"]
    close(tree.leaves(added), [x + y, x + y + 2, 2 * x + 2 * y])
    close(tree.scale(forest(x), 0.0), tree.zeros_like(forest(x)), rtol=0, atol=0)
    other = {"b": y, "a": x}
    close(tree.add({"a": x, "b": y}, other), {"a": 2 * x, "b": 2 * y})
    with pytest.raises(ValueError):
        tree.add({"a": x}, {"a": x, "b": x})


@given(array(2, 3))
def test_global_norm_is_the_root_of_the_sum_of_all_squares(x):
    squares = sum(float(v) ** 2 for leaf in tree.leaves(forest(x)) for v in leaf.flatten())
    close(tree.global_norm(forest(x)).item(), math.sqrt(squares), rtol=1e-9, atol=1e-9)
    assert (grad(tree.global_norm)({"x": torch.zeros_like(x)})["x"] == 0).all()
    close(tree.global_norm({"x": torch.full((4096,), 100.0).half()}), torch.tensor(6400.0))
    assert tree.global_norm({}) == 0


def test_stop_keeps_the_values_and_cuts_the_gradient():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(tree.stop({"x": x})["x"], x)
    assert torch.equal(grad(lambda x: (x * tree.stop(x)).sum())(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scale_keeps_the_dtype_whatever_that_of_the_factor(dtype):
    factor = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=dtype)
    assert tree.scale([x], factor[0])[0].dtype == vmap(tree.scale)(x, factor).dtype == dtype
