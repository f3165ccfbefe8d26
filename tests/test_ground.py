"""The scan, the weights, trees, distributions and checks: laws, and oracles that are slow loops."""

import math
from typing import NamedTuple

import pytest
import torch
from cases_ground import array, finite, keys, masks, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence
from torch.func import grad, vmap

from rlhf_fn import distributions, random, tree
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


logits = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(
    lambda s: st.tuples(*[array(*s, elements=st.floats(-30, 30, width=32))] * 2)
)


@given(logits)
def test_categorical_is_the_one_of_torch(pair):
    x, y = pair
    actions = torch.arange(len(x)) % x.shape[-1]
    p, q = Categorical(logits=x), Categorical(logits=y)
    close(distributions.categorical_log_prob(x, actions), p.log_prob(actions))
    close(distributions.categorical_entropy(x), p.entropy())
    close(distributions.categorical_kl(x, y), kl_divergence(p, q))


@given(logits, finite)
def test_categorical_does_not_depend_on_a_shift_of_the_logits(pair, shift):
    x, y = pair
    close(distributions.categorical_entropy(x + shift), distributions.categorical_entropy(x))
    close(distributions.categorical_kl(x + shift, y - shift), distributions.categorical_kl(x, y))
    assert (distributions.categorical_kl(x, y) > -1e-12).all()
    close(distributions.categorical_kl(x, x), torch.zeros(len(x), dtype=x.dtype), rtol=0, atol=0)


@given(logits, seeds)
def test_a_ruled_out_action_is_as_if_it_were_not_there(pair, seed):
    x, y = pair
    hole = torch.full_like(x[:, :1], -math.inf)
    x_hole, y_hole = torch.cat([hole, x, hole], -1), torch.cat([hole, y, hole], -1)
    for f, holed, plain in (
        (distributions.categorical_entropy, (x_hole,), (x,)),
        (distributions.categorical_kl, (x_hole, y_hole), (x, y)),
    ):
        close(f(*holed), f(*plain))
        close(grad(lambda *a, f=f: f(*a).sum())(*holed)[:, 1:-1], grad(
            lambda *a, f=f: f(*a).sum()
        )(*plain))  # fmt: skip
        assert grad(lambda *a, f=f: f(*a).sum())(*holed).isfinite().all()
    draws = distributions.categorical_sample(x_hole, random.key(seed))
    assert torch.equal(draws, 1 + distributions.categorical_sample(x, random.key(seed)))


def test_kl_is_infinite_where_the_reference_rules_out_what_the_policy_allows():
    x, y = torch.zeros(2), torch.tensor([0.0, -math.inf])
    assert distributions.categorical_kl(x, y) == math.inf
    assert distributions.categorical_kl(y, x) == pytest.approx(math.log(2))


def test_categorical_samples_have_their_probabilities():
    x = torch.tensor([0.0, -math.inf, 1.0, -2.0, 3.0])
    n = 100_000
    draws = distributions.categorical_sample(x.expand(n, 5), random.key(1))
    counts, p = torch.bincount(draws, minlength=5).double(), x.softmax(0).double()
    assert counts[1] == 0
    assert ((counts - n * p) ** 2 / (n * p).clamp(min=1)).sum() < 21  # chi-square, 3 degrees, 1e-4


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_extreme_draws_are_actions_that_are_possible(monkeypatch, word):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(tuple(shape), word))
    for x in (torch.tensor([-math.inf, 0.0, -80.0, -math.inf]), torch.tensor([0.0])):
        action = distributions.categorical_sample(x[None], random.key(0))
        assert 0 <= action < len(x) and x[action] == 0.0


@given(st.integers(257, 1100), seeds, st.floats(0, 30))
def test_a_draw_is_the_first_action_past_its_share_of_the_whole(size, seed, spread):
    impossible, values, key = random.split(random.key(seed), 3)
    x = spread * random.normal(values, (size,)).double()
    x = torch.where(random.uniform(impossible, (size,)) < 0.3, -math.inf, x)
    x[seed % size] = 0.0
    action = int(distributions.categorical_sample(x, key))
    p = [math.exp(v) for v in (x - x.max()).tolist()]
    sought = random._open_unit(key, ()).item() * math.fsum(p)
    assert p[action] > 0
    assert math.fsum(p[:action]) <= sought * (1 + 1e-12)
    assert math.fsum(p[: action + 1]) >= sought * (1 - 1e-12)


def test_an_action_of_probability_1e_9_can_be_drawn(monkeypatch):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(tuple(shape), 2**32 - 1))
    x = torch.tensor([0.0, -20.7])
    assert distributions.categorical_sample(x, random.key(0)) == 1


@given(logits, seeds)
def test_a_draw_depends_on_its_own_row_and_key_alone(pair, seed):
    x, _ = pair
    each = random.split(random.key(seed), len(x))
    draws = distributions.categorical_sample(x, each)
    for i in range(len(x)):
        assert distributions.categorical_sample(x[i], each[i]) == draws[i]
    noise = distributions.normal_sample(x, x.exp(), each)
    close(noise[0], distributions.normal_sample(x[0], x[0].exp(), each[0]), rtol=0, atol=0)


@given(logits, logits)
def test_normal_is_the_one_of_torch(one, two):
    (mean, actions), ref_mean = one, one[1].flip(0)
    scale, ref_scale = (0.1 * mean).exp(), (0.1 * actions).exp()
    p, q = Normal(mean, scale), Normal(ref_mean, ref_scale)
    close(distributions.normal_log_prob(mean, scale, actions), p.log_prob(actions))
    close(distributions.normal_entropy(scale), p.entropy())
    close(distributions.normal_kl(mean, scale, ref_mean, ref_scale), kl_divergence(p, q))


def test_normal_samples_have_their_mean_and_scale_and_differentiate():
    mean, scale = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    draws = vmap(lambda key: distributions.normal_sample(mean, scale, key))(
        random.split(random.key(2), 100_000)
    )
    close(draws.mean(0), mean, rtol=0, atol=0.03)
    close(draws.std(0), scale, rtol=0.02, atol=0)
    close(grad(lambda m: distributions.normal_sample(m, scale, keys()).sum())(mean), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_entropies_and_kls_of_half_precision_are_the_float32_ones(dtype):
    x, y = torch.randn(3, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    s, t, a = x.exp(), y.exp(), torch.tensor([0, 4, 2])
    for f, args in (
        (distributions.categorical_log_prob, (x, a)),
        (distributions.categorical_entropy, (x,)),
        (distributions.categorical_kl, (x, y)),
        (distributions.normal_log_prob, (x, s, y)),
        (distributions.normal_entropy, (s,)),
        (distributions.normal_kl, (x, s, y, t)),
    ):
        wide = [z.float() if z.is_floating_point() else z for z in args]
        close(f(*args), f(*wide), rtol=0, atol=0)
    assert distributions.normal_sample(x, s, keys()).dtype == dtype
