"""Whether a token is the likeliest is told by the pass that sums its log-prob."""

import pytest
import torch
from cases_linear import AGAIN, KEPT, bytes_of, path, problem
from rlhf_kernels import linear

__all__ = ["path"]  # a fixture

how = pytest.mark.parametrize("memory", [KEPT, AGAIN], ids=["kept", "again"])


def hits(hidden, weight, tokens, bias, memory, **options):
    """Of both ways to run: with a gradient to come, and without."""
    x = hidden.requires_grad_(), weight, tokens, bias
    memory = bytes_of(memory, hidden, weight)
    logprobs, found = linear.linear_token_logprobs_and_hits(*x, memory=memory, **options)
    alone = linear.linear_token_logprobs(*x, memory=memory, **options)
    torch.testing.assert_close(logprobs, alone, rtol=0, atol=0, equal_nan=True)
    assert found.dtype == torch.bool and not found.requires_grad
    with torch.no_grad():
        again = linear.linear_token_logprobs_and_hits(*x, memory=memory, **options).hits
    assert torch.equal(found, again)
    return found


@how
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 8.0, "temperature": 0.5}, {"temperature": torch.rand(60, 1) + 0.5}],
    ids=["", "capped", "τ"],
)
@pytest.mark.parametrize("vocab", [50, 17, 2, 1])
def test_a_hit_is_a_token_that_no_other_outweighs(vocab, options, memory, path):
    torch.manual_seed(vocab)
    hidden, weight, tokens, bias = problem(60, vocab=vocab)
    tokens[:6] = vocab - 1
    bias = bias.index_fill(0, torch.arange(0, vocab - 1, 3), -torch.inf)  # some tokens are banned
    z = hidden.double() @ weight.double().mT + bias
    tokens[6:40:2] = z.argmax(-1)[6:40:2]
    if vocab > 2:
        second = z.topk(2).indices[:, 1]  # often within the margin of what is kept
        tokens[7:40:2] = second[7:40:2]
    chosen = z.gather(-1, tokens[:, None])
    expected = (z <= chosen).all(-1) & (chosen[:, 0] > -torch.inf)
    found = hits(hidden, weight, tokens, bias, memory, **options)
    assert torch.equal(found, expected)
    assert found[6:40:2].all() and (vocab == 1 or not found.all())


@how
def test_tied_tokens_are_all_hits_also_where_the_cap_ties_them(memory, path):
    hidden, weight = torch.ones(4, 8), torch.zeros(40, 8)
    weight[[3, 35, 39]] = torch.tensor([[2.0], [2.0], [3.0]])
    bias = torch.zeros(40)
    bias[39] = -8.0
    tokens = torch.tensor([3, 35, 39, 0])
    expected = [True, True, True, False]
    assert hits(hidden, weight, tokens, bias, memory).tolist() == expected
    bias[39] = 1e4
    assert hits(hidden, weight, tokens, bias, memory).tolist() == [False, False, True, False]
    assert hits(hidden, weight, tokens, bias, memory, softcap=0.1).tolist() == expected


@how
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_has_no_hit(poison, memory, path):
    torch.manual_seed(0)
    hidden, weight, tokens, bias = problem(6)
    tokens = (hidden @ weight.mT + bias).argmax(-1)
    poisoned = hidden.clone()
    poisoned[1] = torch.nan
    assert hits(poisoned, weight, tokens, bias, memory).tolist() == [True, False] + [True] * 4
    at = slice(None) if poison == -torch.inf else 20
    bias[at], tokens[0] = poison, 20
    assert not hits(hidden, weight, tokens, bias, memory).any()
