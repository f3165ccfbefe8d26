"""Every transform of torch sees the fused projection as it sees the plain formula."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import differences
from cases_linear import least, path, problem
from rlhf_kernels import linear, linear_cpu
from torch._dynamo.testing import CompileCounter
from torch.func import grad, hessian, jacrev, jvp, vmap

__all__ = ["path"]  # a fixture

T, CAP = 0.7, 9.0
torch.manual_seed(0)
H, W, Y, B = problem(2, 5, width=4, vocab=18, dtype=torch.float64, scale=1.0)
WS = torch.stack([W, W + torch.randn_like(W)])
DH, DW = torch.randn_like(H[0]), torch.randn_like(W)
G = torch.randn(5, dtype=torch.float64)


def kernel(h, w, y, b):
    """log π, hits and H by what is kept, then log π and H, capped, by logits computed again."""
    kept = ours.linear_token_logprobs_and_hits(h, w, y, b, temperature=T)
    entropy = ours.linear_token_logprobs_and_entropy(h, w, y, b, temperature=T).entropy
    both = ours.linear_token_logprobs_and_entropy(
        h, w, y, b, temperature=T, softcap=CAP, memory=least(h, w)
    )
    return kept.logprobs, kept.hits.to(h.dtype), entropy, *both


def formula(h, w, y, b):
    scale = torch.full(y.shape, 1 / T, dtype=h.dtype)
    kept, _, _, hits = linear_cpu.statistics(h, w, b, y, scale, 0.0, False, True, 0)
    _, entropy, *_ = linear_cpu.statistics(h, w, b, y, scale, 0.0, True, True, 0)
    return (
        kept,
        hits.to(h.dtype),
        entropy,
        *linear_cpu.statistics(h, w, b, y, scale, CAP, True, False, 0)[:2],
    )


def loss(f):
    return lambda h, w, y, b: sum((G * out).sum() ** 2 for out in f(h, w, y, b))


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True)


def backward(f, compiler=lambda f: f):
    given = [x.clone().requires_grad_() for x in (H[0], W, B)]
    return torch.autograd.grad(compiler(loss(f))(given[0], given[1], Y[0], given[2]), given)


def pushed(f, h=H[0], w=W):
    return jvp(lambda h, w: f(h, w, Y[0], B), (h, w), (DH, DW))[1]


ALL = (0, 1, 3)
TRANSFORMS = {
    "values": lambda f: f(H[0], W, Y[0], B),
    "backward": backward,
    "grad": lambda f: grad(loss(f), ALL)(H[0], W, Y[0], B),
    "vmap": lambda f: vmap(f, (0, None, 0, None))(H, W, Y, B),
    "grad(vmap)": lambda f: grad(
        lambda h, w: sum((G * out).sum() for out in vmap(f, (0, None, 0, None))(h, w, Y, B)), (0, 1)
    )(H, W),
    "vmap(grad)": lambda f: vmap(grad(loss(f), ALL), (0, None, 0, None))(H, W, Y, B),
    "vmap(grad) in hidden": lambda f: vmap(grad(loss(f)), (0, None, 0, None))(H, W, Y, B),
    "vmap over weights": lambda f: vmap(grad(loss(f), ALL), (None, 0, None, None))(
        H[0], WS, Y[0], B
    ),
    "vmap over both": lambda f: vmap(f, (0, 0, 0, None))(H, WS, Y, B),
    "vmap(vmap(grad))": lambda f: vmap(
        vmap(grad(loss(f), (0, 1)), (0, None, 0, None)), (None, 0, None, None)
    )(H, WS, Y, B),
    "jacrev": lambda f: jacrev(lambda h, w: f(h, w, Y[0], B)[0], (0, 1))(H[0], W),
    "jvp": pushed,
    "hessian": lambda f: hessian(lambda h: loss(f)(h, W, Y[0], B))(H[0]),
    "grad(jvp)": lambda f: grad(lambda w: jvp(lambda h: loss(f)(h, w, Y[0], B), (H[0],), (DH,))[1])(
        W
    ),
}
COMPILED = {
    "backward": lambda f: backward(f, compiled),
    "grad": lambda f: compiled(grad(loss(f), ALL))(H[0], W, Y[0], B),
    "vmap(grad)": lambda f: compiled(vmap(grad(loss(f), ALL), (0, None, 0, None)))(H, W, Y, B),
    # torch can reshape no dual tensor whose primal came into the graph as a view, as H[0] would
    "jvp": lambda f: compiled(lambda h: pushed(f, h))(H[0].clone()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_projection_composes_as_its_formula_does(name, path):
    torch.testing.assert_close(TRANSFORMS[name](kernel), TRANSFORMS[name](formula))


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [
        name if name == "backward" else pytest.param(name, marks=pytest.mark.slow)
        for name in COMPILED
    ],
)
def test_a_projection_composes_inside_one_compiled_graph(name, path):
    torch.testing.assert_close(COMPILED[name](kernel), TRANSFORMS[name](formula))


@pytest.mark.slow
def test_gradients_of_any_order_are_those_of_finite_differences(path):
    def f(h, w, b, t):
        return kernel(h, w, Y[0, :2], b)[0], *ours.linear_token_logprobs_and_entropy(
            h, w, Y[0, :2], b, temperature=t
        )

    t = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (H[0, :2], W, B, t)]
    differences(f, leaves, path)


@pytest.mark.compile
@pytest.mark.parametrize("full, keep", [(True, False), (True, True), (False, True), (False, False)])
def test_an_operator_is_what_it_says_to_the_dispatcher(full, keep, path):
    h, w, b = (x.clone().requires_grad_() for x in (H[0], W, B))
    scale = torch.ones(5, dtype=h.dtype).requires_grad_()
    args = h, w, b, Y[0], scale, 0.0 if keep else CAP, full, keep, 2**20
    torch.library.opcheck(linear._STATISTICS, args)
    logp, entropy, _, _, *hints = (out.detach() for out in linear._STATISTICS(*args))
    upstream = [G.clone().requires_grad_() for _ in range(3)]
    rest = logp, entropy, *hints, *upstream, True, True, False
    torch.library.opcheck(linear._GRADIENT, (*args, *rest))


@pytest.mark.compile
def test_neither_a_temperature_nor_a_length_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def f(h, w, y, t):
        return ours.linear_token_logprobs(h, w, y, temperature=t).sum()

    for length in (2, 3, 4, 5, 6):
        h, w, y, _ = problem(length)
        f(h.requires_grad_(), w, y, torch.tensor(0.5 + length))
    assert counter.frame_count == 1
