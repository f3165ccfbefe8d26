"""Kernels over logits give the numbers of floor 0, at the precision that float32 has."""

import pytest
import rlhf_kernels as ours
import torch
from cases_kernels import FUNCTIONS, eager, gradients, oracle, path, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

__all__ = ["path"]  # a fixture

each = pytest.mark.parametrize("name", ["token_logprobs_and_entropy", "token_logprobs_and_kl"])
CAPPED = {"temperature": 0.5, "softcap": 8.0}


def rms(x):
    return x.double().square().mean().sqrt()


def assert_as_good(got, plain, exact):
    """Within three times the error of the plain formula, or a unit in the last place.

    Both round, and in another order on another processor: of few numbers the errors of two formulas
    that are as good as each other differ by factors up to 2.2, which was seen.
    """
    assert got.shape == exact.shape
    error, allowed = rms(got.double() - exact), 3 * rms(plain.double() - exact)
    allowed = allowed + torch.finfo(torch.float32).eps * rms(exact)
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"


def only(f, which):
    return lambda *args, **options: [f(*args, **options)[i] for i in which]


# the hardest first: it finds most of the bugs that are planted
GRID = [(vocab, {}) for vocab in (100, 49, 48, 33, 32, 31, 17, 16, 15, 2, 1)]


@each
@pytest.mark.parametrize("vocab, options", [(49, CAPPED), (17, CAPPED), *GRID], ids=str)
def test_values_and_gradients_are_as_good_as_the_plain_formula_s(name, vocab, options, path):
    torch.manual_seed(vocab)
    function, which = FUNCTIONS[name]
    x, q, y = problem((16,), vocab)
    upstream = [torch.randn(16) for _ in which]
    cases = [(f, (x, q, y)) for f in (function, only(eager, which))]
    cases.append((only(oracle, which), (x.double(), q.double(), y)))
    for got, plain, exact in zip(*(f(*args, **options) for f, args in cases)):
        assert_as_good(got, plain, exact)
    for got, plain, exact in zip(*(gradients(f, *args, upstream, **options) for f, args in cases)):
        assert_as_good(got, plain, exact)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is_and_summed_in_float32(name, dtype, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, q, y = problem((6,), 40, dtype)
    upstream = [torch.randn(6) for _ in which]
    for got, i in zip(function(x, q, y), which):
        exact = oracle(x, q, y)[i]
        assert got.dtype == torch.float32
        assert_as_good(got, eager(x.float(), q.float(), y)[i], exact)
    got = gradients(function, x, q, y, upstream)
    exact = gradients(only(oracle, which), x.double(), q.double(), y, upstream)
    for g, e in zip(got, exact):
        assert g.dtype == dtype
        # what is stored is rounded once; the interpreter truncates bfloat16
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=4e-6)


@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_large_vocabularies_are_summed_whole(vocab, interpreted, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    torch.manual_seed(0)
    x, q, y = problem((2,), vocab)
    for got, plain, exact in zip(
        ours.token_logprobs_and_kl(x, q, y), eager(x, q, y), oracle(x, q, y)
    ):
        assert_as_good(got, plain, exact)
    (got,) = ours.token_logprobs(x, y, temperature=0.7)[None]
    assert_as_good(got, eager(x, q, y, 0.7)[0], oracle(x, q, y, 0.7)[0])


@pytest.mark.parametrize("gap", [10.0, 15.0, 20.0, 25.0])
def test_the_log_prob_of_a_confident_token_keeps_its_digits(gap, path):
    """Where the usual z_y − log Σ e^z is exactly 0 or worse, log π is right to 1e-6 of itself."""
    torch.manual_seed(0)
    x, q, y = problem((4,), 100)
    x = x + 20
    y = x.argmax(-1)
    x = x.scatter(-1, y[:, None], x.amax(-1, keepdim=True) + gap)
    for logp in (ours.token_logprobs(x, y), ours.token_logprobs_and_kl(x, q, y).logprobs):
        exact = oracle(x, q, y)[0]
        assert (logp < 0).all()
        torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=0)
    upstream = [torch.ones(4)]
    function, _ = FUNCTIONS["token_logprobs"]
    got, _ = gradients(function, x, q, y, upstream)
    exact, _ = gradients(only(oracle, [0]), x.double(), q.double(), y, upstream)
    torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-30)


@each
def test_a_banned_token_has_no_part_in_anything(name, path):
    """−∞ in the first blocks, in the last, everywhere but at one token, and at the token itself."""
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, q, y = problem((4,), 100)
    y = torch.tensor([99, 3, 50, 99])
    banned = torch.zeros(4, 100, dtype=torch.bool)
    banned[0, :60], banned[1, 20:], banned[2], banned[3, 5:40] = True, True, True, True
    banned[2, 50] = False
    x, q = x.masked_fill(banned, -torch.inf), q.masked_fill(banned, -torch.inf)
    upstream = [torch.randn(4) for _ in which]
    for got, i in zip(function(x, q, y, softcap=8.0), which):
        exact = oracle(x, q, y, softcap=8.0)[i]
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)
    for grad in gradients(function, x, q, y, upstream, softcap=8.0):
        assert grad.isfinite().all() and (grad[banned] == 0).all()
    x[0, 99] = -torch.inf
    assert ours.token_logprobs(x, y)[0] == -torch.inf


def test_a_token_that_only_the_reference_bans_makes_the_divergence_infinite(path):
    x, q, y = problem((3,), 40)
    q[1, 7] = -torch.inf
    assert ours.full_kl(x, q).isinf().tolist() == [False, True, False]


@each
def test_a_row_without_upstream_gradient_is_not_read(name, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, q, y = problem((3,), 40)
    x[1], q[1] = torch.nan, torch.inf
    upstream = [torch.tensor([1.0, 0.0, 1.0]) for _ in which]
    for grad in gradients(function, x, q, y, upstream):
        assert grad.isfinite().all() and (grad[1] == 0).all()


def layouts(x, q):
    """The same logits, laid out in memory in other ways."""
    time = x.shape[1]
    wide = torch.full((*x.shape[:-1], x.shape[-1] * 2), torch.nan)
    wide[..., ::2] = x
    longer = torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1)
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1), q
    yield "vocabulary first", x.movedim(-1, 0).contiguous().movedim(0, -1), q
    yield "every other", wide[..., ::2], q.transpose(0, 1).contiguous().transpose(0, 1)
    yield "shifted", longer[:, :time], q
    yield "expanded", x, q[:1, :1].expand_as(q)
    yield "one element in", torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape), q
    four = x[:, None].expand(-1, 2, -1, -1).transpose(0, 2)  # no two strides walk it
    yield "tangled", four, q[:, None].expand(-1, 2, -1, -1).transpose(0, 2)


@each
@pytest.mark.parametrize("which_layout", range(7))
def test_any_layout_gives_the_same_bits(name, which_layout, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, q, y = problem((2, 3), 20)
    _, x, q = list(layouts(x, q))[which_layout]
    y = y if x.ndim == 3 else y[:, None].expand(-1, 2, -1).transpose(0, 2)
    upstream = [torch.randn(x.shape[:-1]) for _ in which]
    plain = x.contiguous(), q.contiguous(), y.contiguous()
    for got, expected in zip(function(x, q, y), function(*plain)):
        assert torch.equal(got, expected)
    for got, expected in zip(
        gradients(function, x, q, y, upstream), gradients(function, *plain, upstream)
    ):
        assert torch.equal(got, expected)


@each
def test_there_may_be_no_rows_and_ids_may_be_int32(name, path):
    function, _ = FUNCTIONS[name]
    x, q, y = problem((2, 3), 40)
    for got, expected in zip(function(x, q, y.int()), function(x, q, y)):
        assert torch.equal(got, expected)
    x, q = (each[:0].requires_grad_() for each in (x, q))
    outputs = function(x, q, y[:0])
    assert all(out.shape == (0, 3) for out in outputs)
    sum(out.sum() for out in outputs).backward()
    assert x.grad.shape == (0, 3, 40)


@st.composite
def rows_of_logits(draw):
    vocab = draw(st.integers(1, 40))
    numbers = st.one_of(
        st.floats(-20, 20, width=32),
        st.sampled_from([-torch.inf, 0.0, 1e4, -1e4, 88.8, -104.0]),
    )
    rows = draw(st.integers(1, 3))
    x, q = (
        torch.tensor(draw(st.lists(numbers, min_size=rows * vocab, max_size=rows * vocab)))
        for _ in range(2)
    )
    y = draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows))
    x, q = x.view(rows, vocab), q.view(rows, vocab)
    x[:, 0], q[:, 0] = x[:, 0].clamp(min=-20), q[:, 0].clamp(min=-20)  # not a row of −∞ alone
    return x, q, torch.tensor(y)


@given(rows_of_logits(), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([None, 5.0]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_any_logits_at_all_give_what_float64_gives(path, case, temperature, softcap):
    x, q, y = case
    options = {"temperature": temperature, "softcap": softcap}
    got, exact = ours.token_logprobs_and_kl(x, q, y, **options), oracle(x, q, y, **options)
    for out, expected in zip(got, exact):
        kept = expected.isfinite()
        torch.testing.assert_close(out.double()[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.logprobs == -torch.inf, exact[0] == -torch.inf)
    grad, _ = gradients(FUNCTIONS["token_logprobs"][0], x, q, y, [torch.ones(len(y))], **options)
    exact, _ = gradients(
        only(oracle, [0]), x.double(), q.double(), y, [torch.ones(len(y))], **options
    )
    good = exact.isfinite().all(-1)
    torch.testing.assert_close(grad[good].double(), exact[good], rtol=1e-5, atol=1e-5)


def test_the_same_input_gives_the_same_bits(path):
    x, q, y = problem((3,), 200)
    first, second = (ours.token_logprobs_and_kl(x, q, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


SCATTERED = {
    "all but the last": lambda x: x[:, :-1],
    "every second": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "of two leading axes": lambda x: x.unflatten(0, (2, 2))[:, :, 1:],
}


@pytest.mark.parametrize("view", SCATTERED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_apart_in_memory_give_the_bits_of_rows_together(name, view, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("rlhf_kernels.cpu.LARGE", 40)
    monkeypatch.setattr("rlhf_kernels.cpu._compiles", lambda: False)
    torch.manual_seed(0)
    x, q, y = (SCATTERED[view](each) for each in problem((4, 5), 20))
    function, which = FUNCTIONS[name]
    options = {"temperature": torch.rand(*y.shape, 1) + 0.5, "softcap": 9.0}
    upstream = [torch.randn(y.shape) for _ in which]
    apart, half, together = (
        (*function(a, b, y, **options), *gradients(function, a, b, y, upstream, **options))
        for a, b in ((x, q), (x.contiguous(), q), (x.contiguous(), q.contiguous()))
    )
    torch.testing.assert_close(apart, together, rtol=0, atol=0)
    torch.testing.assert_close(half, together, rtol=0, atol=0)
