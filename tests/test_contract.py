"""What every public function promises. A new function adds one line to a `CASES`: no more."""

import functools
import inspect
from types import FunctionType

import cases_ground
import cases_groups
import cases_losses
import cases_policy
import cases_preference
import cases_returns
import cases_rewards
import pytest
import torch
from torch.func import vmap
from torch.nn.functional import pad

import rlhf_fn

CASES = {**cases_ground.CASES, **cases_returns.CASES, **cases_losses.CASES}
FAMILIES = (
    cases_groups,
    cases_policy,
    cases_preference,
    cases_rewards,
)  # each names its own exceptions to the promises
for family in FAMILIES:
    CASES |= family.CASES
CASES |= cases_ground.INTEGER_CASES  # keys and draws, rlhf_fn.random's among them

OPTIMIZERS = "makes a Transform of closures; test_optim.py holds it to torch.optim"
EXEMPT = {  # public functions without a case, and why
    name: OPTIMIZERS
    for name in (
        "adamw",
        "chain",
        "clip_by_global_norm",
        "cosine_schedule",
        "fused_adamw",
        "linear_schedule",
        "sgd",
    )
}
EXEMPT |= {
    name: "reads text; test_verifiable.py holds it"
    for name in ("constitutional_score", "exact_number", "follows_format", "last_number")
}
EXEMPT["no_moments"] = "takes no tensor"
WHOLE_BATCH = {  # speaks of all rows together, so mapped over rows it speaks of each row alone
    "token_mean",
    "sequence_mean",
    "fixed_length",
    "group_mean",
    "weighted_sum",
    "whiten",
    "explained_variance",
}
NO_GRADIENT = {
    "clip_fraction",
    "categorical_sample",
}  # counts and draws: constant almost everywhere
FLOAT32_FROM_HALF = {  # log-probs, entropies and divergences
    "approximate_kl",
    "categorical_entropy",
    "categorical_kl",
    "categorical_log_prob",
    "cross_entropy",
    "entropy",
    "full_kl",
    "geometric_mixture_logprobs",
    "k1",
    "k2",
    "k3",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "mixture_logprobs",
    "normal_entropy",
    "normal_kl",
    "normal_log_prob",
    "token_logprobs",
}
for family in FAMILIES:
    WHOLE_BATCH |= family.WHOLE_BATCH
    NO_GRADIENT |= family.NO_GRADIENT
    FLOAT32_FROM_HALF |= family.FLOAT32_FROM_HALF
STOP_GRADIENT = set().union(*(family.STOP_GRADIENT for family in FAMILIES))  # own tests hold them


def tensors(out):
    return tuple(out) if isinstance(out, tuple) else (out,)


def floats(xs):
    return [x for x in xs if x.is_floating_point()]


def last_argument(fn):
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds][-1]


def inputs_of(name):
    torch.manual_seed(0)
    return CASES[name][1]()


def cases(keep=lambda name: True):
    """Run a test for every case that `keep` keeps."""
    return pytest.mark.parametrize("name", [name for name in CASES if keep(name)])


def masked(name):
    return last_argument(CASES[name][0]) == "mask" and floats(inputs_of(name))


def differentiable(name):
    return name not in NO_GRADIENT and floats(inputs_of(name))


def aligned(x, mask):
    """Whether `x` has a value, or a row of them, for every token of `mask`."""
    return x.shape[: mask.ndim] == mask.shape


def poisoned(x, mask, value):
    """`x` with `value`, or an impossible id, wherever `mask` hides a token."""
    if x is mask or not aligned(x, mask):
        return x
    hidden = ~mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    return x.masked_fill(hidden, value if x.is_floating_point() else -100)


def gradients(fn, args):
    """The gradient of a fixed mixture of the outputs, for every floating-point argument."""
    args = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in args]
    outs = floats(tensors(fn(*args)))
    total = sum((y * torch.arange(1, y.numel() + 1).reshape(y.shape)).sum() for y in outs)
    return torch.autograd.grad(total, floats(args), allow_unused=True, materialize_grads=True)


def test_every_public_function_has_a_case():
    public = {n for n in rlhf_fn.__all__ if isinstance(getattr(rlhf_fn, n), FunctionType)}
    assert public - EXEMPT.keys() <= CASES.keys()
    assert CASES.keys() <= public | vars(rlhf_fn.random).keys()
    assert EXEMPT.keys() | WHOLE_BATCH | NO_GRADIENT | FLOAT32_FROM_HALF <= public


def test_the_public_names_are_sorted_and_no_case_stands_under_another_functions_name():
    assert list(rlhf_fn.__all__) == sorted(rlhf_fn.__all__)
    for name, (fn, _) in CASES.items():
        while isinstance(fn, functools.partial):
            fn = fn.func
        wrapper = not fn.__module__.startswith("rlhf_fn")
        assert wrapper or fn.__name__ == name


@cases()
def test_it_writes_to_none_of_its_arguments(name):
    fn, args = CASES[name][0], inputs_of(name)
    before, versions = [x.clone() for x in args], [x._version for x in args]
    for out in tensors(fn(*args)):
        assert all(out is not x for x in args)
    torch.testing.assert_close(list(args), before, rtol=0, atol=0, equal_nan=True)
    assert [x._version for x in args] == versions


@cases()
def test_it_is_its_own_vmap(name):
    fn, args = CASES[name][0], inputs_of(name)
    mapped = tensors(vmap(fn)(*args))
    rows = zip(*[tensors(fn(*row)) for row in zip(*args)])
    torch.testing.assert_close(mapped, tuple(torch.stack(ys) for ys in rows))
    if name not in WHOLE_BATCH:
        torch.testing.assert_close(mapped, tensors(fn(*args)))


@cases(lambda name: differentiable(name) and name not in STOP_GRADIENT)
def test_its_gradient_is_the_gradient_of_its_formula(name):
    fn, args = CASES[name][0], inputs_of(name)
    args = [x.requires_grad_() if x.is_floating_point() else x for x in args]
    assert torch.autograd.gradcheck(fn, args)


def settings_of(name):
    """The numbers that a case fixes, by name, and the function without them."""
    fn = CASES[name][0]
    numbers = getattr(fn, "keywords", {})
    numbers = {key: x for key, x in numbers.items() if isinstance(x, float)}
    rest = {key: x for key, x in getattr(fn, "keywords", {}).items() if key not in numbers}
    return numbers, functools.partial(getattr(fn, "func", fn), **rest)


@cases(lambda name: getattr(CASES[name][0], "keywords", None))
def test_its_settings_are_keywords_and_nothing_else(name):
    fn = CASES[name][0]
    parameters = inspect.signature(fn.func).parameters
    assert {parameters[key].kind for key in fn.keywords} == {inspect.Parameter.KEYWORD_ONLY}


@cases(lambda name: name not in cases_ground.INTEGER_CASES)
def test_what_is_not_asked_for_is_a_keyword_unless_it_is_an_optional_tensor(name):
    parameters = inspect.signature(CASES[name][0]).parameters.values()
    optional = [p for p in parameters if p.default is not p.empty and p.default is not None]
    assert all(p.kind is p.KEYWORD_ONLY for p in optional)


@cases(lambda name: settings_of(name)[0])
def test_its_numbers_may_be_tensors_and_be_mapped_over(name):
    numbers, fn = settings_of(name)
    args = inputs_of(name)
    for key, number in numbers.items():
        with_number = functools.partial(fn, **{k: x for k, x in numbers.items() if k != key})
        both = torch.tensor([number, 0.9 * number], dtype=torch.float64)
        each = [tensors(with_number(*args, **{key: x})) for x in both]
        torch.testing.assert_close(each[0], tensors(CASES[name][0](*args)))
        mapped = vmap(lambda x, f=with_number, key=key: f(*args, **{key: x}))(both)
        torch.testing.assert_close(tensors(mapped), tuple(map(torch.stack, zip(*each))))


@cases(lambda name: floats(inputs_of(name)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_returns_the_dtype_it_was_given(name, dtype):
    fn, args = CASES[name][0], inputs_of(name)
    out = fn(*[x.to(dtype) if x.is_floating_point() else x for x in args])
    wide = name in FLOAT32_FROM_HALF and dtype.itemsize == 2
    for y in floats(tensors(out)):
        assert y.dtype == (torch.float32 if wide else dtype)


@cases(masked)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_it_never_reads_what_its_mask_hides(name, poison):
    fn, args = CASES[name][0], inputs_of(name)
    *_, mask = args
    assert not mask.all()
    dirty = [poisoned(x, mask, poison) for x in args]
    torch.testing.assert_close(fn(*dirty), fn(*args), rtol=0, atol=0)
    if name not in NO_GRADIENT:
        clean, slopes = gradients(fn, args), gradients(fn, dirty)
        torch.testing.assert_close(slopes, clean, rtol=0, atol=0)
        for slope, x in zip(slopes, floats(args)):
            assert not aligned(x, mask) or (slope[~mask] == 0).all()


@cases(lambda name: last_argument(CASES[name][0]) == "mask")
@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 3), (1, 1)])
def test_extra_padding_on_either_side_changes_nothing(name, left, right):
    fn, args = CASES[name][0], inputs_of(name)
    *_, mask = args

    def wider(x):
        if not aligned(x, mask):
            return x
        filler = torch.nan if x.is_floating_point() else 0
        return pad(x, (0, 0) * (x.ndim - mask.ndim) + (left, right), value=filler)

    for y, z in zip(tensors(fn(*args)), tensors(fn(*map(wider, args)))):
        if y.shape == mask.shape:
            assert (z[~wider(mask)] == 0).all()
            z = z[..., left : z.shape[-1] - right]
        torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12, check_dtype=True)


@pytest.mark.compile
@cases()
def test_it_compiles_to_one_graph_equal_to_eager(name):
    fn, args = CASES[name][0], inputs_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: fn(*a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), fn(*args))
    if differentiable(name):
        torch.testing.assert_close(gradients(compiled, args), gradients(fn, args))
