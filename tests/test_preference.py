"""Laws of preference.py, and a float64 loop beside each formula."""

import math

import pytest
import torch
from cases_losses import array, arrays, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad
from torch.nn.functional import logsigmoid, pad

from rlhf_fn.preference import bradley_terry, dpo, implicit_reward, pairwise_token_loss

betas = st.floats(0.01, 2)
shares = st.floats(0, 0.49)


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def vectors(count):
    return arrays(count).map(lambda xs: [x[0] for x in xs])


@given(vectors(2), st.floats(0, 3), st.sampled_from([1, 5, 50]))
def test_bradley_terry_is_its_loop(scores, margin, scale):
    scores = [scale * x for x in scores]
    loss = bradley_terry(*scores, margin=margin)
    for got, chosen, rejected in zip(*[x.tolist() for x in (loss, *scores)]):
        assert got == pytest.approx(minus_log_sigmoid(chosen - rejected - margin), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30, 1e4])
def test_bradley_terry_is_stable_however_far_apart_the_scores_are(size, dtype):
    right = torch.tensor([size, -size], dtype=dtype)
    slope, loss = torch.func.grad_and_value(lambda r: bradley_terry(r, 0 * r).sum())(right)
    assert (
        abs((loss - right[0]).item()) < 1e-12
    )  # −log σ of a large margin is 0, or minus the margin
    torch.testing.assert_close(slope, torch.tensor([0.0, -1.0], dtype=dtype), rtol=0, atol=1e-12)


@given(vectors(2))
def test_swapping_the_answers_changes_bradley_terry_by_their_difference(scores):
    chosen, rejected = scores
    change = bradley_terry(chosen, rejected) - bradley_terry(rejected, chosen)
    torch.testing.assert_close(change, rejected - chosen)


@given(vectors(2), st.integers(-8, 8), st.floats(0, 3))
def test_bradley_terry_knows_only_the_difference_and_a_margin_raises_the_bar(scores, shift, margin):
    chosen, rejected = scores
    shifted = bradley_terry(chosen + shift, rejected + shift, margin=margin)
    torch.testing.assert_close(shifted, bradley_terry(chosen, rejected + margin))
    assert (shifted >= bradley_terry(chosen, rejected) - 1e-9).all()


def divergence_loop(chosen, rejected, pad_id):
    """DeepSpeed-Chat's loop for one pair of (rewards, tokens), with padding told by its id."""
    (win, chosen), (lose, rejected) = chosen, rejected
    ends = [
        tokens.index(pad_id) if pad_id in tokens else len(tokens) for tokens in (chosen, rejected)
    ]
    apart = [t for t in range(len(chosen)) if chosen[t] != rejected[t]]
    if not apart:
        return 0.0
    span = range(apart[0], max(ends))
    return sum(minus_log_sigmoid(win[t] - lose[t]) for t in span) / len(span)


@st.composite
def pairs(draw):
    """Right-padded pairs from a vocabulary of two, so that common prefixes are common."""
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    rewards = draw(array(2, batch, time))
    tokens = draw(array(2, batch, time, elements=st.integers(0, 1), dtype=torch.int64))
    lengths = draw(array(2, batch, elements=st.integers(0, time), dtype=torch.int64))
    mask = torch.arange(time) < lengths[..., None]
    return *rewards, *tokens, *mask


def span(args):
    """Where the pair is compared: the loop's range, from masks."""
    tokens, mask = torch.stack(args[2:4]), torch.stack(args[4:])
    rows = torch.where(mask, tokens, -1)
    started = (rows[0] != rows[1]).long().cumsum(-1) > 0
    return started & mask.any(0)


@given(pairs())
def test_pairwise_token_loss_is_deepspeed_chats_loop(args):
    win, lose, *_ = args
    rows = torch.where(torch.stack(args[4:]), torch.stack(args[2:4]), -1)
    for i, loss in enumerate(pairwise_token_loss(*args).tolist()):
        pair = zip((win[i].tolist(), lose[i].tolist()), rows[:, i].tolist())
        assert loss == pytest.approx(divergence_loop(*pair, pad_id=-1), rel=1e-9)


@given(pairs(), st.sampled_from([math.nan, math.inf, 1e30]), st.integers(0, 1))
def test_pairwise_token_loss_reads_nothing_outside_its_span(args, poison, token):
    def outcome(args):
        return grad(lambda *r: pairwise_token_loss(*r, *args[2:]).sum(), argnums=(0, 1))(*args[:2])

    compared = span(args)
    rewards = [torch.where(compared, x, poison) for x in args[:2]]
    tokens = [torch.where(m, x, token) for x, m in zip(args[2:4], args[4:])]
    poisoned = *rewards, *tokens, *args[4:]
    clean = pairwise_token_loss(*args)
    torch.testing.assert_close(pairwise_token_loss(*poisoned), clean, rtol=0, atol=0)
    torch.testing.assert_close(outcome(poisoned), outcome(args), rtol=0, atol=0)
    assert all((slope[~compared] == 0).all() for slope in outcome(poisoned))


@given(pairs(), st.integers(0, 3), st.integers(0, 3))
def test_pairwise_token_loss_does_not_depend_on_extra_padding(args, left, right):
    fillers = math.nan, math.inf, 0, 1, False, False  # what is written there differs, too
    wider = [pad(x, (left, right), value=filler) for x, filler in zip(args, fillers)]
    torch.testing.assert_close(pairwise_token_loss(*wider), pairwise_token_loss(*args))


@given(pairs())
def test_pairwise_token_loss_of_identical_answers_is_zero_and_so_is_its_gradient(args):
    win, lose, tokens, _, mask, _ = args
    rest = tokens, tokens.clone(), mask, mask.clone()
    assert (pairwise_token_loss(win, lose, *rest) == 0).all()
    assert (grad(lambda r: pairwise_token_loss(r, lose, *rest).sum())(win) == 0).all()


@given(array(1, 6), st.integers(0, 5))
def test_an_answer_that_goes_on_differs_from_its_prefix_whatever_the_padding_is(rewards, length):
    tokens = torch.zeros(1, 6, dtype=torch.long)  # the padding is the very token that goes on
    whole, prefix = tokens == 0, torch.arange(6)[None] < length
    loss = pairwise_token_loss(rewards, -rewards, tokens, tokens, whole, prefix)
    expected = -logsigmoid(2 * rewards[:, length:]).mean(-1)
    torch.testing.assert_close(loss, expected)


@given(pairs())
def test_swapping_the_answers_changes_pairwise_token_loss_by_their_mean_difference(args):
    win, lose, a, b, m, n = args
    change = pairwise_token_loss(*args) - pairwise_token_loss(lose, win, b, a, n, m)
    compared = span(args)
    difference = torch.where(compared, lose - win, 0.0).sum(-1)
    torch.testing.assert_close(change, difference / compared.sum(-1).clamp(min=1))


@given(vectors(4), betas, shares)
def test_dpo_is_its_loop(logprobs, beta, share):
    loss = dpo(*logprobs, beta=beta, label_smoothing=share)
    for got, w, l, ref_w, ref_l in zip(*[x.tolist() for x in (loss, *logprobs)]):  # noqa: E741
        h = beta * ((w - ref_w) - (l - ref_l))
        expected = (1 - share) * minus_log_sigmoid(h) + share * minus_log_sigmoid(-h)
        assert got == pytest.approx(expected, rel=1e-9)


@given(vectors(2), betas, shares)
def test_dpo_of_the_reference_itself_is_log_two(logprobs, beta, share):
    loss = dpo(*logprobs, *logprobs, beta=beta, label_smoothing=share)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)


@given(vectors(4), betas)
def test_dpo_is_minus_log_sigmoid_of_the_implicit_reward_margin(logprobs, beta):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    margin = implicit_reward(w, ref_w, beta=beta) - implicit_reward(l, ref_l, beta=beta)
    torch.testing.assert_close(dpo(*logprobs, beta=beta), -logsigmoid(margin))


@given(vectors(4), betas, shares)
def test_swapping_the_answers_changes_dpo_by_the_unsmoothed_margin(logprobs, beta, share):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    settings = {"beta": beta, "label_smoothing": share}
    change = dpo(*logprobs, **settings) - dpo(l, w, ref_l, ref_w, **settings)
    margin = implicit_reward(w, ref_w, beta=beta) - implicit_reward(l, ref_l, beta=beta)
    torch.testing.assert_close(change, -(1 - 2 * share) * margin)


@given(vectors(4), betas, shares)
def test_smoothed_dpo_is_flipped_labels_at_the_share_of_flips(logprobs, beta, share):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    right, wrong = dpo(*logprobs, beta=beta), dpo(l, w, ref_l, ref_w, beta=beta)
    smoothed = dpo(*logprobs, beta=beta, label_smoothing=share)
    torch.testing.assert_close(smoothed, (1 - share) * right + share * wrong)


@given(betas, st.floats(0.01, 0.49))
def test_smoothed_dpo_is_least_where_the_margin_says_how_sure_the_labels_are(beta, share):
    chosen = torch.tensor(math.log((1 - share) / share) / beta, dtype=torch.float64)
    slope = grad(lambda w: dpo(w, 0 * w, 0 * w, 0 * w, beta=beta, label_smoothing=share))(chosen)
    assert abs(slope) < 1e-12


@given(vectors(4), betas, shares, st.integers(-8, 8))
def test_dpo_does_not_depend_on_what_policy_and_reference_share(logprobs, beta, share, shift):
    w, l, ref_w, ref_l = logprobs  # noqa: E741
    settings = {"beta": beta, "label_smoothing": share}
    shifted = dpo(w + shift, l, ref_w + shift, ref_l, **settings)
    torch.testing.assert_close(shifted, dpo(*logprobs, **settings))


def test_losses_on_pairs_refuse_other_shapes_by_name():
    x, y = torch.zeros(3), torch.zeros(3, 1)
    with refused("rejected"):
        bradley_terry(x, y)
    with refused("ref_logprobs"):
        implicit_reward(x, y, beta=0.1)
    for i in range(4):
        with refused("shapes differ"):
            dpo(*[y if i == j else x for j in range(4)], beta=0.1)
    for i, name in enumerate(pairwise_token_loss.__annotations__):
        if name != "return":
            inputs = [
                torch.zeros(2, 3).to(d)
                for d in [torch.float] * 2 + [torch.long] * 2 + [torch.bool] * 2
            ]
            inputs[i] = inputs[i][..., :1]
            with refused(name):
                pairwise_token_loss(*inputs)


def test_losses_on_pairs_refuse_settings_that_cannot_mean_anything():
    x = torch.zeros(3)
    for beta in (0.0, -0.1, math.nan):
        with refused("beta must be"):
            implicit_reward(x, x, beta=beta)
    for share in (-0.1, 1.1):
        with refused("label_smoothing must be"):
            dpo(x, x, x, x, beta=0.1, label_smoothing=share)
    ids, kept = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    with refused("chosen_mask must be torch.bool", TypeError):
        pairwise_token_loss(kept, kept, ids, ids, kept, kept == 1)
    with refused("rejected_mask must be torch.bool", TypeError):
        pairwise_token_loss(kept, kept, ids, ids, kept == 1, kept)
