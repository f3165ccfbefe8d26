"""Products in the order in which a CPU is fastest: the same sums, also without units for half."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fn import products, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.models import causal_lm
from rlhf_fn.precision import cast, in_dtype
from rlhf_fn.products import linear

HALVES = [torch.bfloat16, torch.float16]
LARGE = 256, 256
each_half = pytest.mark.parametrize("dtype", HALVES)
close = torch.testing.assert_close


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def shaped(shape, seed=0, out=LARGE[0], inner=LARGE[1], dtype=torch.float64):
    sizes = ((*shape, inner), (out, inner), (out,))
    return [drawn(*size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]


@given(
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=2).map(tuple),
    time=st.integers(0, 2),
    large=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_it_is_torchs_linear_of_any_shape(shape, time, large, biased, seed):
    x, weight, bias = shaped((*shape, time), seed, *(LARGE if large else (3, 5)))
    bias = bias if biased else None
    close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    of_one = weight[0]
    close(linear(of_one, weight, bias), F.linear(of_one, weight, bias), rtol=1e-12, atol=1e-12)


def summed(function):
    return lambda x, weight, bias: function(x, weight, bias).sin().sum()


def test_it_composes_as_torchs_linear_does():
    x, weight, bias = shaped((4, 1))
    every = (0, 1, 2)
    ours, torchs = (grad(summed(f), every)(x, weight, bias) for f in (linear, F.linear))
    close(ours, torchs, rtol=1e-12, atol=1e-12)
    ours, torchs = (
        vmap(grad(summed(f), every), in_dims=(0, None, 0))(
            drawn(3, 4, 1, 256, seed=7), weight, drawn(3, 256, seed=8)
        )
        for f in (linear, F.linear)
    )
    close(ours, torchs, rtol=1e-12, atol=1e-12)
    ours, torchs = (
        jvp(f, (x, weight, bias), (x, 2 * weight, 3 * bias)) for f in (linear, F.linear)
    )
    close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.plain
def test_it_compiles_in_one_graph():
    given = shaped((4, 1))
    compiled = torch.compile(linear, fullgraph=True)
    close(compiled(*given), F.linear(*given), rtol=1e-12, atol=1e-12)
    half = [x.bfloat16() for x in given]
    close(compiled(*half), linear(*half))


@each_half
@pytest.mark.parametrize("shape", [(4, 1), (5, 7)])
def test_of_half_precision_only_the_result_is_rounded(dtype, shape, monkeypatch):
    monkeypatch.setattr(products, "_WIDENED", frozenset(HALVES))
    args = shaped(shape, dtype=dtype)
    out, exact = linear(*args), F.linear(*(y.double() for y in args))
    assert out.dtype == dtype
    ulp = torch.finfo(dtype).eps
    assert ((out - exact).abs() <= 0.51 * ulp * exact.abs() + 2e-5).all()


class Products(TorchDispatchMode):
    """The dtypes of all products of matrices, and of what attention is asked."""

    def __init__(self):
        super().__init__()
        self.matrices, self.attention = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        floats = {
            x.dtype for x in tree.leaves(args) if torch.is_tensor(x) and x.is_floating_point()
        }
        if "attention" in name:
            self.attention |= floats
        elif name in ("mm", "addmm", "bmm", "baddbmm", "mv", "dot"):
            self.matrices |= floats
        return func(*args, **(kwargs or {}))


def used(family, dtype):
    """The dtypes of the products of a step and of a token, and of its attention."""
    module = tiny.fresh(family).float()
    model, params = causal_lm(module), causal_lm(module).params
    tokens = torch.randint(0, tiny.VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))

    def loss(params):
        logits = in_dtype(model, dtype).apply(params, tokens, tiny.whole(tokens))
        return logits.float().logsumexp(-1).sum()

    half, reads = cast(params, dtype), decoder(module)
    with Products() as asked:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        torch.autograd.grad(loss(leaves), list(leaves.values()))
        _, cache = reads.prefill(half, tokens, tiny.whole(tokens), 6)
        reads.decode(half, tokens[:, 0], tiny.whole(tokens[:, [0] * 6]), 5, cache)
    return asked.matrices, asked.attention


def units(monkeypatch, *, vectors, matrices):
    """A CPU that has such units for half precision."""
    monkeypatch.setattr(products, "_WIDENED", frozenset(() if vectors or matrices else HALVES))
    monkeypatch.setattr(products, "_WIDELY_ATTENDED", frozenset(() if matrices else HALVES))


@pytest.mark.parametrize("family", tiny.DECODERS)
@each_half
def test_a_cpu_without_units_for_half_precision_makes_no_product_in_it(family, dtype, monkeypatch):
    wide, half = {torch.float32}, {dtype}
    units(monkeypatch, vectors=False, matrices=False)
    assert used(family, dtype) == (wide, wide)
    units(monkeypatch, vectors=True, matrices=False)
    matrices, attention = used(family, dtype)
    assert half <= matrices and attention == wide, "short rows are slower in units of vectors"
    units(monkeypatch, vectors=True, matrices=True)
    matrices, attention = used(family, dtype)
    assert half <= matrices and half <= attention, "units are used where they are"


@each_half
def test_units_are_those_that_torch_names(dtype, monkeypatch):
    def lacking(*kinds, **has):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        return products._without(*kinds)

    name, both = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], tuple(HALVES)
    assert lacking(products._VECTORS) == frozenset(), "nobody knows"
    assert lacking(products._VECTORS, products._MATRICES, avx2=True) == frozenset(both)
    vectors = {"avx2": True, f"avx512_{name}": True, f"amx_{name}": False}
    assert dtype not in lacking(products._VECTORS, products._MATRICES, **vectors)
    assert dtype in lacking(products._MATRICES, **vectors)
    assert dtype not in lacking(products._MATRICES, **vectors | {f"amx_{name}": True})


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_with_units_or_without_a_model_in_half_precision_says_the_same(family, monkeypatch):
    module = tiny.fresh(family).float()
    model = causal_lm(module)
    tokens = torch.randint(0, tiny.VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    given = model.params, tokens, tiny.whole(tokens)
    whole, said = model.apply(*given), []
    for has in (False, True):
        units(monkeypatch, vectors=has, matrices=has)
        said.append(in_dtype(model, torch.bfloat16).apply(*given).float())
    ulp, far = torch.finfo(torch.bfloat16).eps, [(x - whole).abs().max() for x in said]
    assert 0 < far[0] < max(1.5 * far[1], 8 * ulp), "no worse than units"


@pytest.mark.parametrize("family", tiny.DECODERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_of_few_rows_has_the_logits_of_the_whole(family, rows, monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 0)
    module = tiny.tiny(family)
    (apply, params), reads = causal_lm(module), decoder(module)
    tokens = torch.randint(0, tiny.VOCAB, (rows, 5), generator=torch.Generator().manual_seed(rows))
    real = tiny.whole(tokens)
    logits, cache = reads.prefill(params, tokens[:, :4], real[:, :4], 5)
    said = logits, reads.decode(params, tokens[:, 4], real, 4, cache)[0]
    close(torch.stack(said, 1), apply(params, tokens, real)[:, 3:], rtol=1e-12, atol=1e-12)
