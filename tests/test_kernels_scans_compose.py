"""Every transform of torch sees a scan as it sees the plain formula."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import differences
from cases_scans import CLIPS, RATES, path
from rlhf_kernels import backups, scans
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jacrev, jvp, vmap

import rlhf_fn as floor

__all__ = ["path"]  # a fixture

torch.manual_seed(0)
SHAPE = 2, 3, 6
R, V, DR = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
END, LAM = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
MASK = torch.rand(SHAPE) > 0.3


def everything(module):
    """All outputs of (rewards, values, mask, bootstrap)."""

    def function(r, v, mask, end, lam=0.9):
        rates = RATES | {"lam": lam}
        return (
            module.suffix_scan(r, v.tanh()),
            module.discounted_returns(r, mask, discount=0.97, bootstrap=end),
            *module.gae(r, v, mask, bootstrap=end, **rates),
            *module.vtrace(r, v, v, r, mask, **rates, **CLIPS),
        )

    return function


kernel, formula = everything(ours), everything(floor)


def loss(f):
    def total(*args):
        return sum((out.sin() * DR[0]).sum() ** 2 for out in f(*args))

    return total


def args(i=slice(None)):
    return R[i], V[i], MASK[i], END[i]


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True)


def backward(f, compiler=lambda f: f):
    r, v, end = (x[0].clone().requires_grad_() for x in (R, V, END))
    return torch.autograd.grad(compiler(loss(f))(r, v, MASK[0], end), (r, v, end))


def pushed(f, r=R[0], v=V[0]):
    return jvp(lambda r, v: f(r, v, *args(0)[2:]), (r, v), (DR[0], DR[1]))[1]


TRANSFORMS = {
    "values": lambda f: f(*args(0)),
    "backward": backward,
    "grad": lambda f: grad(loss(f), (0, 1, 3))(*args(0)),
    "vmap": lambda f: vmap(f)(*args()),
    "vmap(grad)": lambda f: vmap(grad(loss(f), (0, 1, 3)))(*args()),
    "vmap over one of them, from behind": lambda f: vmap(
        grad(loss(f)), in_dims=(-1, None, None, None), out_dims=1
    )(R.movedim(0, -1), *args(0)[1:]),
    "vmap over lam": lambda f: vmap(f, (None, None, None, None, 0))(*args(0), LAM),
    "grad in lam": lambda f: grad(loss(f), 4)(*args(0), LAM[0]),
    "jacrev": lambda f: jacrev(lambda r: f(r, *args(0)[1:])[2])(R[0]),
    "jvp": pushed,
    "hessian": lambda f: hessian(lambda r, v: loss(f)(r, v, *args(0)[2:]), (0, 1))(R[0], V[0]),
    "grad(grad)": lambda f: grad(lambda r: grad(loss(f), 1)(r, *args(0)[1:]).sin().sum())(R[0]),
}
COMPILED = {
    "backward": lambda f: backward(f, compiled),
    "vmap(grad)": lambda f: compiled(vmap(grad(loss(f), (0, 1, 3))))(*args()),
    "jacrev": lambda f: compiled(jacrev(lambda r: f(r, *args(0)[1:])[2]))(R[0]),
    "jvp": lambda f: compiled(lambda r, v: pushed(f, r, v))(R[0], V[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_scan_composes_as_its_formula_does(name, path):
    torch.testing.assert_close(TRANSFORMS[name](kernel), TRANSFORMS[name](formula))


QUICK = "backward"


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED],
)
def test_a_scan_composes_inside_one_compiled_graph(name, path):
    torch.testing.assert_close(COMPILED[name](kernel), TRANSFORMS[name](formula))


@pytest.mark.slow
def test_gradients_of_any_order_and_mode_are_those_of_finite_differences(path):
    def f(r, v, end, discount, lam):
        rates = {"discount": discount, "lam": lam}
        a, b = ours.gae(r, v, MASK[0, :2], bootstrap=end, **rates)
        return (
            ours.suffix_scan(r, v),
            ours.discounted_returns(r, MASK[0, :2], discount=discount),
            a,
            b,
        )

    rates = (torch.tensor(x, dtype=torch.float64) for x in ([[0.9], [0.5]], [[0.8], [0.3]]))
    leaves = [x.clone().requires_grad_() for x in (R[0, :2], V[0, :2], END[0, :2], *rates)]
    differences(f, leaves, path, check_forward_ad=True)


@pytest.mark.compile
@pytest.mark.parametrize("valued", [False, True])
def test_an_operator_is_what_it_says_to_the_dispatcher(valued, path):
    r, v, end = (x[0].clone().requires_grad_() for x in (R, V, END))
    rates = None, None, 0.97, 0.9
    torch.library.opcheck(backups._BACKUP, (r, v if valued else None, MASK[0], end, *rates))
    torch.library.opcheck(backups._GRADIENT, (r, v if valued else None, MASK[0], *rates))
    for op in (scans._SUFFIX, scans._PREFIX):
        torch.library.opcheck(op, (r, v))


@pytest.mark.compile
def test_neither_a_rate_nor_a_length_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def f(r, mask, lam):
        return sum(x.sum() for x in ours.gae(r, r, mask, discount=0.9, lam=lam))

    for length in (2, 3, 4, 5, 6):
        r = torch.randn(3, length)
        f(r, r > 0, torch.tensor(0.1 * length))
    assert counter.frame_count == 1
