"""`sample` and `greedy` return floor 0's tokens, and log-probs of what was sampled from."""

import pytest
import rlhf_kernels as ours
import torch
from cases_sampling import (
    DTYPES,
    SUPPORTS,
    all_ranked,
    assert_drawn,
    cpu,
    drawn,
    keys_for,
    path,
    problem,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_fn

__all__ = ["cpu", "path"]  # fixtures

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "the last position": lambda x: x[:, -1],
    "the vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1, :1].expand(2, 3, -1),
    "every other token": lambda x: x[..., ::2],
    "three axes out of order": lambda x: x.view(1, 2, 3, -1).permute(2, 0, 1, 3),
    "one row": lambda x: x[0, 0],
    "no rows": lambda x: x[:, :0],
}


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_draws_what_floor_0_draws(vocab, dtype, path):
    x, keys = problem(2, vocab, dtype=dtype, seed=vocab)
    assert_drawn(ours.sample(x, keys, temperature=1.0), drawn(x, keys, temperature=1.0))


@pytest.mark.parametrize("vocab", [1, 33])
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_sample_draws_what_floor_0_draws_from_a_support(vocab, support, path):
    for dtype, temperature in ((torch.float32, 0.8), (torch.bfloat16, 2.0)):
        x, keys = problem(2, vocab, dtype=dtype, seed=vocab)
        support = support | {"temperature": temperature}
        assert_drawn(ours.sample(x, keys, **support), drawn(x, keys, **support))


@pytest.mark.parametrize("support", [{}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_sample_draws_what_floor_0_draws_from_float64(support, path):
    x, keys = problem(1, 24, dtype=torch.float64)
    x = x + 1e-12 * torch.arange(24)
    assert_drawn(
        ours.sample(x, keys, temperature=0.7, **support),
        drawn(x, keys, temperature=0.7, **support),
    )


def test_a_whole_vocabulary_is_drawn_from(path):
    if "small" not in path:
        x, keys = problem(1, 50257)
        support = {"temperature": 0.9, "top_k": 300, "top_p": 0.9}
        assert_drawn(ours.sample(x, keys, **support), drawn(x, keys, **support))
        x, keys = problem(3, 50257, dtype=torch.bfloat16)
        assert_drawn(ours.sample(x, keys, temperature=0.9), drawn(x, keys, temperature=0.9))
        assert_drawn(ours.greedy(x), (x.argmax(-1), x.double().log_softmax(-1).amax(-1)))


def test_a_cpu_takes_any_share_of_a_vocabulary(cpu):
    x, keys = problem(4, 6000)
    for top_k in (None, 1, 7, 200, 2900, 5999, 6000, 9999):
        for top_p in (None, 0.01, 0.5, 0.999, 1.0):
            support = {"temperature": 0.5, "top_k": top_k, "top_p": top_p}
            assert_drawn(ours.sample(x, keys, **support), drawn(x, keys, **support))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_keys_of_any_strides_are_drawn_from(layout, path):
    x, _ = problem(2, 3, 38)
    x = LAYOUTS[layout](x)
    keys = keys_for(*x.shape[:-1]).movedim(-1, 0).repeat_interleave(2, 0).movedim(0, -1)[..., ::2]
    assert_drawn(ours.sample(x, keys, temperature=1.0), drawn(x, keys, temperature=1.0))
    assert_drawn(ours.greedy(x), (x.argmax(-1), x.double().log_softmax(-1).amax(-1)))
    if x.ndim == 2:
        support = {"temperature": 1.0, "top_k": 8, "top_p": 0.9}
        assert_drawn(ours.sample(x, keys, **support), drawn(x, keys, **support))


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=["rows", "tokens"])
def test_offsets_have_64_bits(strides, tmp_path):
    """A file of 4 GiB that takes no space."""
    x = torch.from_file(str(tmp_path / "x"), True, 2**31 + 8, dtype=torch.float16)
    x = x.as_strided((3, 3), strides)
    x.copy_(torch.eye(3).flip(0) * 30)
    assert ours.greedy(x).tokens.tolist() == [2, 1, 0]
    for support in ({}, {"top_k": 2}, {"top_p": 0.9}):
        assert ours.sample(x, keys_for(3), temperature=1.0, **support).tokens.tolist() == [2, 1, 0]


def test_temperature_may_be_a_tensor_and_one_per_row(path):
    x, keys = problem(2, 2, 20)
    each, some = torch.rand(2, 2, 1) + 0.3, torch.rand(2, 1) + 0.3
    for temperature, top_p in ((torch.tensor(0.5), 1.0), (each, 0.6), (some, 1.0)):
        got = ours.sample(x, keys, temperature=temperature, top_p=top_p)
        assert_drawn(got, drawn(x, keys, temperature=temperature, top_p=top_p))
        likeliest = (x / temperature).double().log_softmax(-1).amax(-1)
        assert_drawn(ours.greedy(x, temperature=temperature), (x.argmax(-1), likeliest))


def test_a_softcap_comes_before_the_temperature(path):
    x, keys = problem(2, 33)
    x[:, 3], capped = -torch.inf, 2 * (x.double() / 2).tanh()
    capped[:, 3] = -torch.inf
    for support in ({}, {"top_k": 7}, {"top_p": 0.6}):
        support = support | {"temperature": 0.5}
        got = ours.sample(x, keys, softcap=2.0, **support)
        assert_drawn(got, drawn(capped.float(), keys, **support))
    likeliest = capped.mul(2).log_softmax(-1).amax(-1)
    assert_drawn(ours.greedy(x, temperature=0.5, softcap=2.0), (x.argmax(-1), likeliest))


@pytest.mark.parametrize(
    "support", [*SUPPORTS, {"top_p": 0.3}, {"top_k": 12, "top_p": 0.9}, {"top_k": 19}], ids=str
)
def test_of_equals_the_support_keeps_those_of_lowest_index(support, path):
    """Three distinct logits for 20 tokens: there are equals at every edge."""
    torch.manual_seed(0)
    x, keys = torch.randint(0, 3, (2, 20)).to(torch.bfloat16), keys_for(2)
    got = ours.sample(x, keys, temperature=0.7, **support)
    assert_drawn(got, all_ranked(x, keys, temperature=0.7, **support))


@pytest.mark.parametrize("first", [0.0, 1.0], ids=["all equal", "one above"])
def test_equals_across_blocks_are_one_queue(first, path):
    x = torch.zeros(3, 40)
    x[:, 37] = first
    keys = keys_for(3, seed=5)
    for support in ({"top_k": 18}, {"top_p": 0.51}):
        got = ours.sample(x, keys, temperature=1.0, **support)
        assert_drawn(got, all_ranked(x, keys, **support))


def test_neighbouring_floats_are_two_logits_and_zero_is_one_whatever_its_sign(path):
    ulps = torch.rand(3, 24).argsort(-1)
    zeros = torch.tensor([0.0, -0.0, -1.0, 1e-45, -1e-45, -0.0, 0.0, 0.0]).repeat(3)
    x, keys = torch.stack([1 + 2.0**-23 * ulps[0], -1 - 2.0**-23 * ulps[1], zeros]), keys_for(3)
    for support in ({"top_k": 8}, {"top_k": 13}, {"top_p": 0.13}, {"top_p": 0.37}, {"top_p": 0.71}):
        got = ours.sample(x, keys, temperature=1.0, **support)
        assert_drawn(got, all_ranked(x, keys, **support))


def test_a_share_is_a_float64(path):
    """Three of ten equals hold 0.3, of which float32 has a little more."""
    x, keys = torch.zeros(2, 10), keys_for(2)
    got = ours.sample(x, keys, temperature=1.0, top_p=0.3)
    assert_drawn(got, all_ranked(x, keys, top_p=0.3))
    assert torch.allclose(got.logprobs.exp(), torch.tensor(1 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top_k_is_k_tokens_whatever_is_equal(dtype, cpu):
    torch.manual_seed(0)
    x = (torch.randn(60) / 4).to(dtype)
    for top_k in (1, 5, 17):
        got = ours.sample(x.expand(3000, -1), keys_for(3000), temperature=1.0, top_k=top_k)
        assert got.tokens.unique().numel() == top_k


def test_what_is_banned_is_never_drawn(path):
    x, keys = problem(4, 33)
    x[torch.rand(4, 33) < 0.5] = -torch.inf
    x[0, :20] = x[1, 16:] = x[2, :32] = -torch.inf  # whole blocks, and all but one token
    for support in ({}, {"top_k": 30}, {"top_p": 0.999}):
        got = ours.sample(x, keys, temperature=1.0, **support)
        assert_drawn(got, drawn(x, keys, temperature=1.0, **support))
        assert x.gather(-1, got.tokens[:, None]).isfinite().all()
    assert ours.greedy(x).tokens.tolist() == x.argmax(-1).tolist()


def test_a_row_without_a_distribution_gives_token_0_and_nan_and_spoils_no_other(path):
    x, keys = problem(5, 33)
    sound, x = x.clone(), x.clone()
    x[0, 32], x[1], x[2, 7], x[3, 0] = torch.nan, -torch.inf, torch.inf, torch.nan
    for support in ({}, {"top_k": 4}, {"top_p": 0.5}):
        got = ours.sample(x, keys, temperature=1.0, **support)
        assert got.tokens[:4].tolist() == [0] * 4 and got.logprobs[:4].isnan().all()
        expected = drawn(sound[4:], keys[4:], temperature=1.0, **support)
        assert_drawn(ours.Sample(got.tokens[4:], got.logprobs[4:]), expected)
    got = ours.greedy(x)
    assert got.tokens[:4].tolist() == [0] * 4 and got.logprobs[:4].isnan().all()
    assert got.tokens[4] == sound[4].argmax() and got.logprobs[4].isfinite()


def test_log_probs_of_confident_rows_keep_their_digits(path):
    x = torch.zeros(2, 33, dtype=torch.float64)
    x[0, 20], x[1, 0] = 20.0, 16.0
    exact = -(32 * x.amax(-1).neg().exp()).log1p()
    for got in (ours.greedy(x.float()), ours.sample(x.float(), keys_for(2), temperature=1.0)):
        assert got.tokens.tolist() == [20, 0]
        torch.testing.assert_close(got.logprobs.double(), exact, rtol=1e-6, atol=0)


def test_greedy_takes_the_first_of_equals(path):
    x = torch.zeros(3, 40, dtype=torch.bfloat16)
    x[1, [19, 35]], x[2, [35, 36]] = 1.0, 1.0
    assert ours.greedy(x).tokens.tolist() == [0, 19, 35]


@pytest.mark.parametrize("support", [{}, {"top_k": 6}, {"top_p": 0.8}], ids=str)
def test_tokens_come_as_often_as_they_should(support, cpu):
    """χ² of 30,000 draws, below what one in 10,000 exceeds."""
    torch.manual_seed(1)
    x, count = torch.randn(10), 30000
    z = rlhf_fn.rollout.sampling_logits(x, temperature=0.8, **support)
    expected = z.softmax(-1) * count
    tokens = ours.sample(x.expand(count, -1), keys_for(count), temperature=0.8, **support).tokens
    seen = torch.bincount(tokens, minlength=10)
    inside = expected > 0
    assert not seen[~inside].any()
    assert ((seen - expected)[inside] ** 2 / expected[inside]).sum() < 33.7


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 30),
    vocab=st.integers(1, 700),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_what_a_row_draws_does_not_depend_on_its_batch(rows, vocab, top_k, top_p, seed, cpu):
    x, keys = problem(rows, vocab, seed=seed)
    support = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
    together = ours.sample(x, keys, **support)
    row = seed % rows
    alone = ours.sample(x[row], keys[row], **support)
    assert torch.equal(together.tokens[row], alone.tokens)
    assert torch.equal(together.logprobs[row], alone.logprobs)
    assert torch.equal(ours.greedy(x).logprobs[row], ours.greedy(x[row]).logprobs)
