"""The divergence between two projections is that between their logits, which are never held."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import eager, oracle
from cases_linear import path, problem
from rlhf_kernels import linear_divergence, linear_divergence_cpu
from test_kernels_logits import assert_as_good
from torch.func import grad, jvp, vmap

__all__ = ["path"]  # a fixture

LEAST = 16  # of cases_linear.path


def pair(*shape, vocab=50, dtype=torch.float32):
    """Two projections near to one another, of different widths."""
    torch.manual_seed(vocab)
    h, w, *_ = problem(*shape, vocab=vocab, width=12)
    hq = torch.cat([h, torch.randn(*shape, 5)], -1)
    wq = torch.cat([w, torch.randn(vocab, 5) / 3], -1)
    return tuple(x.to(dtype) for x in (h, w, hq, wq))


def of(divergence):
    """A function of logits as one of two projections."""

    def function(h, w, hq, wq, **options):
        x, q = (a @ b.mT for a, b in ((h, w), (hq, wq)))
        return divergence(x, q, torch.zeros(x.shape[:-1], dtype=torch.int64), **options)[2]

    return function


def gradients(function, given, upstream, **options):
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given, **options)
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]


def memory(given):
    return given[0][..., 0].numel() * LEAST * given[0].element_size()


@pytest.mark.parametrize("vocab", [50, 33, 16, 5, 1])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "softcap": 8.0}], ids=str)
def test_it_and_all_four_gradients_are_as_good_as_the_plain_formula_s(vocab, options, path):
    given, upstream = pair(48, vocab=vocab), torch.randn(48)
    got = gradients(ours.linear_full_kl, given, upstream, **options, memory=memory(given))
    usual = gradients(of(eager), given, upstream, **options)
    right = gradients(of(oracle), [x.double() for x in given], upstream, **options)
    for a, b, c in zip(got, usual, right):
        if vocab == 1:  # all is 0
            torch.testing.assert_close(a.double(), c, rtol=0, atol=1e-5)
        else:
            assert_as_good(a, b, c)


def test_half_precision_is_summed_in_float32(path):
    given, upstream = pair(20, dtype=torch.bfloat16), torch.randn(20)
    got = gradients(ours.linear_full_kl, given, upstream)
    right = gradients(of(oracle), [x.double() for x in given], upstream)
    torch.testing.assert_close(got[0].double(), right[0], rtol=1e-5, atol=1e-5)
    for a, c in zip(got[1:], right[1:]):
        assert a.dtype == torch.bfloat16
        assert (a.double() - c).norm() <= 2 * torch.finfo(torch.bfloat16).eps * c.norm()


def test_a_row_without_upstream_gradient_is_not_read(path):
    given, upstream = pair(40), torch.randn(40)
    unread = torch.arange(40) % 3 == 1
    unread[16:32] = True
    upstream = upstream.masked_fill(unread, 0.0)
    right = gradients(of(oracle), [x.double() for x in given], upstream)
    poisoned = [x.masked_fill(unread[:, None], torch.nan) if len(x) == 40 else x for x in given]
    got = gradients(ours.linear_full_kl, poisoned, upstream)
    for a, c in zip(got[1:], right[1:]):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


def test_there_may_be_no_rows_and_equal_projections_do_not_diverge(path):
    given = pair(2, 3)
    out, *grads = gradients(
        ours.linear_full_kl, [given[0][:0], given[1], given[2][:0], given[3]], torch.ones(0, 3)
    )
    assert out.shape == (0, 3) and not any(g.any() for g in grads)
    same = ours.linear_full_kl(*given[:2], *given[:2])
    torch.testing.assert_close(same, torch.zeros(2, 3), rtol=0, atol=2e-6)


def kernel(h, w, hq, wq):
    return ours.linear_full_kl(h, w, hq, wq, temperature=0.7, softcap=9.0)


def formula(h, w, hq, wq):
    scale = torch.full(h.shape[:-1], 1 / 0.7, dtype=h.dtype)
    return linear_divergence_cpu.divergence(h, w, hq, wq, scale, 9.0, 0)


def loss(f):
    return lambda *args: (f(*args) * torch.arange(1, 4)).sum() ** 2


ALL = (0, 1, 2, 3)
H, W, HQ, WQ = (x.double() for x in pair(2, 3, vocab=18))
TRANSFORMS = {
    "grad": lambda f: grad(loss(f), ALL)(H[0], W, HQ[0], WQ),
    "vmap": lambda f: vmap(f, (0, None, 0, None))(H, W, HQ, WQ),
    "vmap(grad)": lambda f: vmap(grad(loss(f), ALL), (0, None, 0, None))(H, W, HQ, WQ),
    "vmap(grad) in hidden": lambda f: vmap(grad(loss(f)), (0, None, 0, None))(H, W, HQ, WQ),
    "jvp": lambda f: jvp(lambda h, w: f(h, w, HQ[0], WQ), (H[0], W), (H[1], W.sin()))[1],
    "jvp(grad)": lambda f: jvp(grad(lambda h: loss(f)(h, W, HQ[0], WQ)), (H[0],), (H[1],))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_composes_as_its_formula_does(name, path):
    torch.testing.assert_close(TRANSFORMS[name](kernel), TRANSFORMS[name](formula))


@pytest.mark.compile
def test_it_composes_inside_one_compiled_graph(path):
    torch._dynamo.reset()
    got = torch.compile(lambda *x: torch.func.grad(loss(kernel), ALL)(*x), fullgraph=True)
    torch.testing.assert_close(got(H[0], W, HQ[0], WQ), TRANSFORMS["grad"](formula))


@pytest.mark.compile
@pytest.mark.parametrize("of_reference", [False, True])
def test_an_operator_is_what_it_says_to_the_dispatcher(of_reference, path):
    given = [x.clone().requires_grad_() for x in (H[0], W, HQ[0], WQ)]
    args = *given, None, 9.0, 2**20
    torch.library.opcheck(linear_divergence._DIVERGENCE, args)
    outputs = [out.detach() for out in linear_divergence._DIVERGENCE(*args)]
    rest = *outputs, torch.rand(3).double().requires_grad_(), of_reference, True, True
    torch.library.opcheck(linear_divergence._GRADIENT, (*args, *rest))


BAD = {
    "another vocabulary": (lambda h, w, a, b: (h, w, a, b[:9]), ValueError, "shape"),
    "another batch": (lambda h, w, a, b: (h, w, a[:1], b), ValueError, "shape"),
    "another width": (lambda h, w, a, b: (h, w, a[..., :3], b), ValueError, "ref_hidden"),
    "another dtype": (lambda h, w, a, b: (h, w, a.float(), b.float()), TypeError, "dtype"),
    "two dtypes": (lambda h, w, a, b: (h, w, a, b.float()), TypeError, "ref_weight"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_any_launch(what):
    make, error, words = BAD[what]
    with pytest.raises(error, match=words):
        ours.linear_full_kl(*make(H, W, HQ, WQ))
    for options in ({"softcap": -1.0}, {"temperature": 0.0}, {"memory": 10}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ours.linear_full_kl(H, W, HQ, WQ, **options)
