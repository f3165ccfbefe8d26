"""Errors name the argument; checks of values run where reading is free and trace away elsewhere."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.func import grad, jvp, vmap

from rlhf_fn import checks, distributions, weights
from rlhf_fn.scan import suffix_scan

ids, mask, real = torch.tensor([[0, 3], [-1, 2]]), torch.tensor([True, False]), torch.zeros(2)
late = torch.full((2, 9), 3)  # an id past three, though not past nine
deep, nan = torch.zeros(2, 3), math.nan


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: checks.same_shape(a=real, b=ids), ValueError, r"a \(2,\), b \(2, 2\)"),
        (lambda: checks.floating(x=ids), TypeError, "x must be floating.*int64"),
        (lambda: checks.bool_mask(real), TypeError, "mask must be torch.bool.*float32"),
        (lambda: checks.bool_mask(ids, name="keep"), TypeError, "keep must be"),
        (lambda: checks.integers(n=mask), TypeError, "n must hold integers, got torch.bool"),
        (lambda: checks.token_ids(real, 3), TypeError, "tokens must hold integers"),
        (lambda: checks.token_ids(ids, 4), ValueError, r"tokens\[1, 0\] is -1.*\[0, 4\)"),
        (lambda: checks.token_ids(ids[:1], 3), ValueError, r"tokens\[0, 1\] is 3"),
        (lambda: checks.finite(torch.tensor([0, nan]), name="r"), ValueError, r"r\[1\] is nan"),
        (lambda: checks.positive(eps=0.0), ValueError, "eps must be .*> 0, got 0"),
        (lambda: checks.positive(eps=math.inf), ValueError, "eps"),
        (lambda: checks.non_negative(beta=-1.0), ValueError, "beta must be .*>= 0, got -1"),
        (lambda: checks.unit_interval(lam=1.1), ValueError, r"lam must be .*\[0, 1\]"),
        (lambda: checks.below_one(b=torch.tensor([0.0, 1.0])), ValueError, r"b must be .*\[0, 1\)"),
        (lambda: checks.unit_interval(lam=nan), ValueError, "lam"),
        (lambda: checks.positive(eps="1"), TypeError, "eps must be .*'1' of type str"),
        (lambda: checks.token_ids(ids, 4, "ids"), TypeError, "positional"),
        (lambda: checks.row_tokens("x", torch.zeros(2, 9, 3), late), ValueError, "tokens.* is 3"),
        (lambda: checks.per_token(deep, deep[:, :2]), ValueError, r"advantages are \(2, 2\)"),
        (lambda: checks.count(least=1, n=0), ValueError, "n must be at least 1, got 0"),
        (lambda: checks.count(least=1, n=True), TypeError, "n must be an int"),
        (lambda: checks.count(least=1, n=2.0), TypeError, "n must be an int"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_got_and_expected(call, error, says):
    with pytest.raises((error, TypeCheckError), match=f"{says}|Type-check error"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: checks.same_shape(a=real, b=real),
        lambda: checks.token_ids(ids.clamp(min=0), 4),
        lambda: checks.token_ids(ids[:0], 4),
        lambda: checks.finite(torch.tensor([0, nan]), mask, name="rewards"),
        lambda: checks.unit_interval(a=0.0, b=1.0, c=torch.tensor([0.0, 1.0])),
        lambda: checks.positive(a=1e-300, b=torch.ones(2, requires_grad=True)),
        lambda: checks.per_token(deep, deep[:, :1]),
        lambda: checks.count(least=0, n=0),
    ],
)
def test_a_good_argument_passes(call):
    assert call() is None


@pytest.mark.parametrize(
    ("check", "inside"),
    [
        (checks.positive, {0.25, 0.5, 0.75, 1.0, 1.5}),
        (checks.non_negative, {0.0, 0.25, 0.5, 0.75, 1.0, 1.5}),
        (checks.unit_interval, {0.0, 0.25, 0.5, 0.75, 1.0}),
        (checks.width, {0.0, 0.25, 0.5, 0.75, 1.0, 1.5, math.inf}),
        (checks.minority, {0.0, 0.25}),
        (checks.above_one, {1.5, math.inf}),
        (checks.below_one, {0.0, 0.25, 0.5, 0.75}),
    ],
)
@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_range_holds_its_numbers_and_no_other(check, inside, number):
    for x in (-math.inf, -1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, math.inf, nan):
        if x in inside:
            check(x=number(x))
        else:
            with pytest.raises(ValueError, match=f"x must be .*, got {x}"):
                check(x=number(x))


# The type checker of the typed run finds these first, and names the argument too.
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: suffix_scan(real, torch.zeros(3)), "decay"),
        (lambda: weights.weighted_sum(real, torch.zeros(2, 1)), "weights"),
        (lambda: weights.token_mean(real), "mask"),
        (lambda: weights.sequence_mean(ids), "mask"),
        (lambda: weights.fixed_length(mask, length=0), "length"),
        (lambda: weights.group_mean(mask), "mask"),
        (lambda: distributions.categorical_log_prob(torch.zeros(2, 3), ids), "actions"),
        (lambda: distributions.categorical_log_prob(torch.zeros(2, 2, 3), ids), "actions"),
        (lambda: distributions.categorical_log_prob(torch.zeros(2, 9, 3), late), "actions.* is 3"),
        (lambda: distributions.categorical_entropy(ids), "logits"),
        (lambda: distributions.categorical_kl(real, torch.zeros(3)), "ref_logits"),
        (lambda: distributions.categorical_sample(real, torch.zeros(1, 2).long()), "key"),
        (lambda: distributions.categorical_sample(real, torch.zeros(3, 2).long()), "key"),
        (lambda: distributions.normal_log_prob(real, real, torch.zeros(1)), "actions"),
        (lambda: distributions.normal_kl(real, real, real, torch.zeros(1)), "ref_scale"),
    ],
)
def test_a_function_names_its_bad_argument(call, names):
    with pytest.raises((ValueError, TypeError), match=names):
        call()


def test_values_are_read_only_where_reading_is_free():
    seen = []

    def look(x):
        seen.append(checks.concrete(x))
        return x.sum()

    x = torch.zeros(2, 3)
    look(x), grad(look)(x), jvp(look, (x,), (x,)), look(x[:0])
    assert seen == [True] * 4
    seen.clear()
    vmap(look)(x), vmap(grad(look))(x), grad(lambda x: vmap(look)(x).sum())(x)
    look(torch.zeros(2, device="meta"))
    assert seen == [False] * 4


def test_values_of_another_device_are_not_waited_for():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    assert not checks.concrete(real.as_subclass(Elsewhere))


@pytest.mark.compile
def test_checks_of_values_trace_away():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def checked(x, tokens):
        checks.token_ids(tokens, 2)
        checks.finite(x, name="x")
        checks.positive(x=x, eps=1e-8)
        return x + 1

    torch._dynamo.reset()
    assert torch.equal(checked(-real, ids), real + 1)
    vmap(lambda x: checks.finite(x, name="x") or x)(torch.tensor([nan, 0.0]))
