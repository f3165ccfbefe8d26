"""Every transform of torch sees a kernel as it sees the plain formula."""

import importlib

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import differences, path, problem
from rlhf_kernels import divergence, formulas, logprobs, rows
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jacrev, jvp, vmap

__all__ = ["path"]  # a fixture

T, CAP = 0.7, 9.0
torch.manual_seed(0)
X, Q, Y = problem((2, 3, 5), 7, torch.float64, scale=1.0)
DX, W = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch, path):
    monkeypatch.setattr(rows, "plan", lambda number, vocab: rows.Plan(4, 4, -(-vocab // 4), 4))


def kernel(x, q, y):
    both = ours.token_logprobs_and_entropy(x, y, temperature=T, softcap=CAP)
    return (*both, *ours.token_logprobs_and_kl(x, q, y, temperature=T, softcap=CAP))


def formula(x, q, y):
    scale = torch.full(y.shape, 1 / T, dtype=x.dtype)
    both = formulas.logprobs(x, y, scale, CAP, True)
    return (*both, *formulas.divergence(x, q, y, scale, CAP))


def loss(f):
    return lambda x, q, y: sum((W * out).sum() ** 2 for out in f(x, q, y))


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True)


def backward(f, compiler=lambda f: f):
    x, q = X[0].clone().requires_grad_(), Q[0].clone().requires_grad_()
    return torch.autograd.grad(compiler(loss(f))(x, q, Y[0]), (x, q))


def pushed(f, x=X[0], q=Q[0]):
    return jvp(lambda x, q: f(x, q, Y[0]), (x, q), (DX, DX.flip(0)))[1]


TRANSFORMS = {
    "values": lambda f: f(X[0], Q[0], Y[0]),
    "backward": backward,
    "grad": lambda f: grad(loss(f), (0, 1))(X[0], Q[0], Y[0]),
    "vmap": lambda f: vmap(f)(X, Q, Y),
    "vmap(grad)": lambda f: vmap(grad(loss(f), (0, 1)))(X, Q, Y),
    "vmap(vmap(grad))": lambda f: vmap(vmap(grad(loss(f))))(X[None], Q[None], Y[None]),
    "vmap over one of them, from behind": lambda f: vmap(
        grad(loss(f)), in_dims=(-1, None, None), out_dims=1
    )(X.movedim(0, -1), Q[0], Y[0]),
    "jacrev": lambda f: jacrev(lambda x: f(x, Q[0], Y[0])[-1])(X[0]),
    "jvp": pushed,
    "hessian": lambda f: hessian(loss(f))(X[0, :1], Q[0, :1], Y[0, :1]),
    "grad(jvp)": lambda f: grad(lambda x: jvp(lambda z: loss(f)(z, Q[0], Y[0]), (x,), (DX,))[1])(
        X[0]
    ),
}
COMPILED = {
    "backward": lambda f: backward(f, compiled),
    "grad": lambda f: compiled(grad(loss(f), (0, 1)))(X[0], Q[0], Y[0]),
    "vmap(grad)": lambda f: compiled(vmap(grad(loss(f), (0, 1))))(X, Q, Y),
    "vmap(vmap(grad))": lambda f: compiled(vmap(vmap(grad(loss(f)))))(X[None], Q[None], Y[None]),
    "jacrev": lambda f: compiled(jacrev(lambda x: f(x, Q[0], Y[0])[-1]))(X[0]),
    "jvp": lambda f: compiled(lambda x, q: pushed(f, x, q))(X[0], Q[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_kernel_composes_as_its_formula_does(name):
    torch.testing.assert_close(TRANSFORMS[name](kernel), TRANSFORMS[name](formula))


def quick(*names, of):
    """The others are slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in of]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", quick("backward", "jvp", of=TRANSFORMS))
def test_half_precision_composes_as_float32_of_the_same_numbers(name, dtype):
    """Up to a rounding of each gradient to half precision, or two where two are added."""

    def lowered(f):
        return lambda x, q, y: f(x.to(dtype), q.to(dtype), y)

    got = TRANSFORMS[name](lowered(kernel))
    exact = TRANSFORMS[name](lowered(lambda x, q, y: formula(x.float(), q.float(), y)))
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, exact, rtol=eps, atol=eps, check_dtype=False)


@pytest.mark.compile
@pytest.mark.parametrize("name", quick("backward", "vmap(grad)", of=COMPILED))
def test_a_kernel_composes_inside_one_compiled_graph(name):
    torch.testing.assert_close(COMPILED[name](kernel), TRANSFORMS[name](formula))


@pytest.mark.slow
def test_gradients_of_any_order_and_mode_are_those_of_finite_differences(path):
    def f(x, q, temperature):
        first = ours.token_logprobs_and_entropy(x, Y[0, 0, :2], temperature=temperature)
        return (*first, *ours.token_logprobs_and_kl(x, q, Y[0, 0, :2], temperature=temperature))

    t = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    leaves = [each.clone().requires_grad_() for each in (X[0, 0, :2], Q[0, 0, :2], t)]
    differences(f, leaves, path, check_forward_ad=True)


@pytest.mark.compile
@pytest.mark.parametrize("scaled", [False, True])
def test_an_operator_is_what_it_says_to_the_dispatcher(scaled):
    x, q, y = X[0].clone().requires_grad_(), Q[0].clone().requires_grad_(), Y[0]
    scale = torch.ones(y.shape, dtype=x.dtype).requires_grad_() if scaled else None
    torch.library.opcheck(logprobs._STATISTICS, (x, y, scale, CAP, True, False))
    torch.library.opcheck(divergence._DIVERGENCE, (x, q, y, scale, CAP))
    saved = [out.detach() for out in logprobs._STATISTICS(x, y, scale, CAP, True, False)]
    upstream = [W.clone().requires_grad_() for _ in range(2)]
    torch.library.opcheck(logprobs._GRADIENT, (x, y, scale, CAP, True, *saved[1:], *upstream))


@pytest.mark.compile
def test_neither_a_temperature_nor_a_length_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def f(x, y, t):
        return ours.token_logprobs(x, y, temperature=t).sum()

    for length in (2, 3, 4, 5, 6):
        x, _, y = problem((length,), 7)
        f(x, y, torch.tensor(0.5 + length))
    assert counter.frame_count == 1


def test_the_private_names_that_registration_stands_on_are_there():
    for module, name in (
        ("torch._functorch.utils", "enable_single_level_autograd_function"),
        ("torch.autograd.function", "_SingleLevelFunction"),
        ("torch.autograd.forward_ad", "_set_fwd_grad_enabled"),
        ("torch._C", "_AutoDispatchBelowAutograd"),
        ("torch._C._functorch", "is_functorch_wrapped_tensor"),
        ("torch._C._functorch", "peek_interpreter_stack"),
        ("torch._C._functorch", "is_legacy_batchedtensor"),
    ):
        assert hasattr(importlib.import_module(module), name)


BAD = {
    "a token beyond the vocabulary": (lambda: (X[0], Y[0] + 7, {}), ValueError, "tokens"),
    "a negative token": (lambda: (X[0], Y[0] - 9, {}), ValueError, "tokens"),
    "tokens of another shape": (lambda: (X[0], Y[0, :2], {}), ValueError, "tokens"),
    "tokens that are no integers": (lambda: (X[0], Y[0].double(), {}), TypeError, "tokens"),
    "tokens of another device": (lambda: (X[0], Y[0].to("meta"), {}), ValueError, "device"),
    "logits of integers": (lambda: (X[0].long(), Y[0], {}), TypeError, "logits"),
    "no vocabulary": (lambda: (X[0, ..., :0], Y[0], {}), ValueError, "vocab"),
    "a temperature of 0": (lambda: (X[0], Y[0], {"temperature": 0.0}), ValueError, "temperature"),
    "a temperature of 0 in one row": (
        lambda: (X[0], Y[0], {"temperature": torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]).mT}),
        ValueError,
        "temperature",
    ),
    "a temperature per token of the vocabulary": (
        lambda: (X[0], Y[0], {"temperature": torch.ones(7)}),
        ValueError,
        "temperature",
    ),
    "a negative softcap": (lambda: (X[0], Y[0], {"softcap": -1.0}), ValueError, "softcap"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_any_launch(what):
    make, error, name = BAD[what]
    x, y, options = make()
    with pytest.raises(error, match=name):
        ours.token_logprobs(x, y, **options)
    with pytest.raises(error, match=name):
        ours.token_logprobs_and_kl(x, x, y, **options)


def test_reference_logits_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="ref_logits"):
        ours.full_kl(X[0], Q[0, ..., :5])
