"""Log-probs from hidden states give the numbers of floor 0's, without its logits."""

import pytest
import torch
from cases_linear import (
    AGAIN,
    FUNCTIONS,
    KEPT,
    bytes_of,
    exact,
    gradients,
    least,
    path,
    plain,
    problem,
    wide,
)
from rlhf_kernels import linear, rows
from rlhf_kernels import linear_tiles as tiles
from test_kernels_logits import assert_as_good

__all__ = ["path"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")

each = pytest.mark.parametrize("name", FUNCTIONS)
how = pytest.mark.parametrize("memory", [KEPT, AGAIN], ids=["kept", "again"])
CAPPED = {"temperature": 0.5, "softcap": 8.0}


@each
@how
@pytest.mark.parametrize(
    "vocab, options", [(33, CAPPED)] + [(v, {}) for v in (97, 50, 33, 17, 16, 15, 3, 1)], ids=str
)
def test_values_and_gradients_are_as_good_as_the_plain_formula_s(
    name, vocab, options, memory, path
):
    torch.manual_seed(vocab)
    function, which = FUNCTIONS[name]
    x = problem(37, vocab=vocab, width=8 + vocab % 5)
    upstream = [torch.randn(37) for _ in which]
    ours = gradients(function, *x, upstream, memory=bytes_of(memory, *x[:2]), **options)
    theirs = gradients(plain(which), *x, upstream, **options)
    truth = gradients(exact(which), *wide(*x), upstream, **options)
    for got, usual, right in zip(ours, theirs, truth):
        for a, b, c in zip(got, usual, right):
            assert_as_good(a, b, c)


@each
@how
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_its_gradients_are_rounded_once(
    name, dtype, memory, path
):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x = problem(20, dtype=dtype)
    upstream = [torch.randn(20) for _ in which]
    outputs, got = gradients(function, *x, upstream, memory=bytes_of(memory, *x[:2]))
    single = (z.float() if z.is_floating_point() else z for z in x)
    for a, b, c in zip(outputs, plain(which)(*single), exact(which)(*wide(*x))):
        assert a.dtype == torch.float32
        assert_as_good(a, b, c)
    _, right = gradients(exact(which), *wide(*x), upstream)
    for a, c in zip(got, right):
        assert a.dtype == dtype
        # two roundings: of ∂/∂x, which the interpreter truncates, and of the result
        assert (a.double() - c).norm() <= 2 * torch.finfo(dtype).eps * c.norm()


@each
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("path", ["cpu"], indirect=True)
def test_a_cpu_that_multiplies_bfloat16_sums_in_float32_and_rounds_once(
    name, multiplies, path, monkeypatch
):
    monkeypatch.setattr(rows, "_multiplies_bfloat16", lambda: multiplies)
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, _ = problem(370, vocab=1000, dtype=torch.bfloat16)
    upstream = torch.where(torch.arange(370) % 3 == 0, 0.0, torch.randn(370))
    asked, hidden[3] = upstream != 0, torch.nan
    given = hidden.requires_grad_(), weight.requires_grad_()
    logp, *_ = function(*given, tokens)
    got = torch.autograd.grad((upstream * logp)[asked].sum(), given)
    truth = wide(hidden[asked].detach(), weight.detach())
    logp, *_ = exact(which)(*(x.requires_grad_() for x in truth), tokens[asked])
    right = torch.autograd.grad((upstream[asked] * logp).sum(), truth)
    assert (got[0][~asked] == 0).all()
    for a, c in zip((got[0][asked], got[1]), right):
        # a rounding has an error of ε/4; with units there are two, a sum's and its factor's
        most = (0.4 if multiplies else 0.3) * torch.finfo(torch.bfloat16).eps
        assert (a.double() - c).norm() <= most * c.norm()


@each
@pytest.mark.parametrize("asked", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
def test_what_is_kept_gives_the_gradients_of_what_is_computed_again(name, asked, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, upstream = problem(3, 7), [asked[i] * torch.randn(3, 7) for i in which]
    others, again = gradients(function, *x, upstream, memory=least(*x[:2]))
    barely = 21 * (50 + tiles.LEAST) * 4  # then the gradient in x is made of parts
    for memory in (KEPT, barely):
        values, kept = gradients(function, *x, upstream, memory=memory)
        torch.testing.assert_close(values, others, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(kept, again, rtol=1e-5, atol=4e-6)


@each
@how
def test_only_what_is_kept_spares_the_logits_their_second_product(name, memory, path):
    """A weight that was overwritten since gives logits, and so a gradient, of its own."""
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(9)
    weight.requires_grad_()
    both = [
        sum(out.sum() for out in function(hidden, weight, tokens, bias, memory=each))
        for each in [bytes_of(memory, hidden, weight)] * 2
    ]
    (right,) = torch.autograd.grad(both[0], weight)
    weight.data.mul_(0.5)
    (got,) = torch.autograd.grad(both[1], weight)
    assert torch.equal(got, right) == (memory == KEPT)


@each
@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_memory_changes_no_result(name, parts, path, monkeypatch):
    monkeypatch.setattr(tiles, "LEAST", 1)
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x, upstream = problem(5), [torch.randn(5) for _ in which]
    size = -(-50 // parts) * 5 * 4
    ours = gradients(function, *x, upstream, memory=size - (parts == 1))
    for got, right in zip(ours, gradients(exact(which), *wide(*x), upstream)):
        for a, c in zip(got, right):
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)


@how
@pytest.mark.parametrize("gap", [15.0, 25.0])
def test_the_log_prob_of_a_nearly_certain_token_keeps_its_digits(gap, memory, path):
    torch.manual_seed(0)
    hidden, weight, tokens, _ = problem(4)
    bias = torch.zeros(50)
    chosen = weight[tokens]
    hidden = gap * chosen / chosen.square().sum(-1, keepdim=True)
    weight = weight.scatter(0, tokens[:, None].expand(-1, 24), chosen)
    ours, grads = gradients(
        FUNCTIONS["log π"][0], hidden, weight, tokens, bias, [torch.ones(4)],
        memory=bytes_of(memory, hidden, weight),
    )  # fmt: skip
    truth, right = gradients(exact([0]), *wide(hidden, weight, tokens, bias), [torch.ones(4)])
    # of the largest, as a product of matrices has it
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=2e-5, atol=0)
    for a, c in zip(grads, right):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5 * c.abs().max().item())


@each
@how
def test_a_token_that_is_all_but_impossible_has_a_finite_log_prob(name, memory, path):
    """e^u would overflow around it: centres move in the middle of the vocabulary, once or twice."""
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(6)
    tokens[:] = torch.tensor([0, 20, 49, 0, 20, 49])
    bias = bias.clone()
    bias[30:] += 200.0
    bias[40:] += 300.0
    upstream = [torch.randn(6) for _ in which]
    x = hidden, weight, tokens, bias
    ours = gradients(function, *x, upstream, memory=bytes_of(memory, hidden, weight))
    for got, right in zip(ours, gradients(exact(which), *wide(*x), upstream)):
        for a, c in zip(got, right):
            torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=2e-4)


@each
@how
def test_a_banned_token_has_no_part_in_anything(name, memory, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(9)
    banned = torch.zeros(50, dtype=torch.bool)
    banned[:20] = banned[33] = True
    tokens = torch.where(banned[tokens], 40, tokens)
    bias = bias.masked_fill(banned, -torch.inf)
    upstream = [torch.randn(9) for _ in which]
    outputs, grads = gradients(
        function, hidden, weight, tokens, bias, upstream, memory=bytes_of(memory, hidden, weight)
    )
    for a, c in zip(outputs, exact(which)(*wide(hidden, weight, tokens, bias))):
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][banned].any() and not grads[2][banned].any()
    tokens[3] = 33
    assert linear.linear_token_logprobs(hidden, weight, tokens, bias)[3] == -torch.inf


@each
@how
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_upstream_gradient_is_not_read(name, memory, poison, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(40)
    unread = torch.arange(40) % 3 == 1
    unread[16:32] = True
    upstream = [torch.randn(40).masked_fill(unread, 0.0) for _ in which]
    poisoned = hidden.masked_fill(unread[:, None], poison)
    memory = bytes_of(memory, hidden, weight)
    _, got = gradients(function, poisoned, weight, tokens, bias, upstream, memory=memory)
    _, right = gradients(exact(which), *wide(hidden, weight, tokens, bias), upstream)
    assert not got[0][unread].any()
    for a, c in zip(got, right):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


@each
def test_any_layout_gives_the_same_bits(name, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(2, 3)
    upstream = [torch.randn(2, 3) for _ in which]
    wide = torch.full((50, 48), torch.nan)
    wide[:, ::2] = weight
    shifted = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(50, 24)
    layouts = (
        (hidden.transpose(0, 1).contiguous().transpose(0, 1), weight, tokens),
        (hidden, weight.T.contiguous().T, tokens.int()),
        (hidden, wide[:, ::2], tokens.T.contiguous().T),
        (torch.cat([hidden, hidden], -1)[..., :24], shifted, tokens),
    )
    first = gradients(function, hidden, weight, tokens, bias, upstream)
    for h, w, y in layouts:
        again = gradients(function, h, w, y, bias, upstream)
        for got, expected in zip(again, first):
            assert all(torch.equal(a, b) for a, b in zip(got, expected))


@each
def test_there_may_be_no_rows_or_one_and_one_row_for_many(name, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    hidden, weight, tokens, bias = problem(2, 3)
    outputs, grads = gradients(
        function, hidden[:0], weight, tokens[:0], bias, [torch.zeros(0, 3) for _ in which]
    )
    assert all(out.shape == (0, 3) for out in outputs)
    assert grads[0].shape == (0, 3, 24) and not grads[1].any() and not grads[2].any()
    for out, one in zip(
        function(hidden, weight, tokens, bias), function(hidden[1, 2], weight, tokens[1, 2], bias)
    ):
        torch.testing.assert_close(one, out[1, 2], rtol=1e-5, atol=1e-6)
    same = hidden[:1, :1].expand(2, 3, -1)
    for a, b in zip(
        function(same, weight, tokens, bias), function(same.clone(), weight, tokens, bias)
    ):
        assert torch.equal(a, b)


@each
@how
def test_temperatures_may_differ_from_row_to_row(name, memory, path):
    torch.manual_seed(0)
    function, which = FUNCTIONS[name]
    x = problem(3, 4)
    upstream = [torch.randn(3, 4) for _ in which]
    tau = torch.rand(3, 4, 1) + 0.5
    memory = bytes_of(memory, *x[:2])
    ours = gradients(function, *x, upstream, temperature=tau, memory=memory)
    for got, right in zip(ours, gradients(exact(which), *wide(*x), upstream, temperature=tau)):
        for a, c in zip(got, right):
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)


@each
def test_the_same_input_gives_the_same_bits(name, path):
    x, upstream = problem(30), [torch.ones(30)] * 2
    first, second = (gradients(FUNCTIONS[name][0], *x, upstream) for _ in range(2))
    for a, b in zip(first, second):
        assert all(torch.equal(*pair) for pair in zip(a, b))
