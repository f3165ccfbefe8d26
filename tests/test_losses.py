"""What holds of every loss, and each of them against its formula in slow float64 loops."""

import math

import pytest
import torch
from cases_steps import BOTH, CASES, CLIPS, CRITIC, KEY, LM, POLICY, ROWS, SCORER, VOCAB, batch_of
from torch.func import grad

from rlhf_fn import tree
from rlhf_fn.logprobs import full_kl
from rlhf_fn.optim import adamw, sgd
from rlhf_fn.steps import (
    ActorCriticBatch,
    PairBatch,
    PolicyBatch,
    SftBatch,
    ValueBatch,
    functional_gradient,
    gradient_step,
    next_token_logprobs,
    policy_loss,
    sft_loss,
    train_state,
    value_loss,
)
from rlhf_fn.weights import sequence_mean, token_mean


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_what_the_weights_hide_is_never_read(case):
    batch = batch_of(case.batch)
    hidden = batch._replace(weights=batch.weights.clone())
    hidden.weights[1] = 0
    gone = hidden.weights == 0
    read = {"tokens", "attention", "weights"}
    poisoned = {
        name: torch.where(gone.view(*gone.shape, *[1] * (x.ndim - gone.ndim)), torch.nan, x)
        for name, x in hidden._asdict().items()
        if x.is_floating_point() and name not in read
    }
    gradient = functional_gradient(case.loss)
    clean = gradient(case.params, hidden, KEY)
    dirty = gradient(case.params, hidden._replace(**poisoned), KEY)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_padding_ids_and_more_padding_change_nothing(case):
    batch, reference = batch_of(case.batch), functional_gradient(case.loss)
    changed = {}
    for name, x in batch._asdict().items():
        if x.ndim > 1:
            changed[name] = torch.nn.functional.pad(x, (2, 1))
    changed["tokens"] = torch.where(changed["attention"], changed["tokens"], VOCAB - 1)
    dirty = reference(case.params, batch._replace(**changed), KEY)
    torch.testing.assert_close(dirty, reference(case.params, batch, KEY), rtol=1e-9, atol=1e-12)


def test_every_loss_falls_when_it_is_followed(case):
    batch, optimizer = (
        batch_of(case.batch),
        adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0),
    )
    step, state = gradient_step(case.loss, optimizer), train_state(case.params, optimizer)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch, KEY)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])
    assert state.step == 12


def test_sft_overfits_to_the_entropy_of_its_data():
    """After one prompt the answer is 3 in three rows of four and 4 in one: the optimum is known."""
    tokens = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 5], [1, 2, 3, 5], [1, 2, 4, 5]])
    mask = torch.tensor([[False, False, True, True]] * 4)
    batch = SftBatch(tokens, torch.ones_like(mask), token_mean(mask, dtype=torch.float64))
    optimizer = adamw(2e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    step, state = gradient_step(sft_loss(LM.apply), optimizer), train_state(LM.params, optimizer)
    for _ in range(150):
        state, metrics = step(state, batch, KEY)
    optimum = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    assert optimum <= metrics["loss"] < optimum + 5e-3
    assert metrics["accuracy"] == 7 / 8
    probs = LM.apply(state.params, tokens, batch.attention)[0, 1].softmax(-1)
    torch.testing.assert_close(
        probs[[3, 4]], torch.tensor([0.75, 0.25]).double(), rtol=0, atol=0.02
    )


def test_a_step_on_the_kl_term_alone_lowers_the_exact_kl():
    """Every token after every token, weighed by the policy: the expectation, without sampling."""
    torch.manual_seed(2)
    ref = {name: p + 0.3 * torch.randn_like(p) for name, p in LM.params.items()}
    firsts = torch.arange(VOCAB)
    tokens = torch.cartesian_prod(firsts, firsts)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    logprobs = next_token_logprobs(LM.apply)
    old, ref_logprobs = (logprobs(p, tokens, attention) for p in (LM.params, ref))
    weights = torch.where(torch.tensor([False, True]), old.exp() / VOCAB, 0.0)
    batch = PolicyBatch(tokens, attention, old, ref_logprobs, torch.zeros_like(old), weights)
    loss = policy_loss(LM.apply, **CLIPS, temperature=1.0, kl_coef=1.0, entropy_coef=0.0)

    def exact(params):
        logits = (LM.apply(p, firsts[:, None], attention[:VOCAB, :1])[:, 0] for p in (params, ref))
        return full_kl(*logits).mean()

    torch.testing.assert_close(
        grad(loss, has_aux=True)(LM.params, batch, KEY)[0], grad(exact)(LM.params)
    )
    optimizer = sgd(1e-2)
    new, metrics = gradient_step(loss, optimizer)(train_state(LM.params, optimizer), batch, KEY)
    torch.testing.assert_close(metrics["kl/ref"], exact(LM.params))
    assert exact(new.params) < exact(LM.params) - 1e-4


def test_the_first_epoch_has_ratio_one_and_the_policy_gradient():
    batch = batch_of(PolicyBatch)
    logprobs = next_token_logprobs(LM.apply, temperature=0.7)
    now = logprobs(LM.params, batch.tokens, batch.attention)
    on_policy = batch._replace(old_logprobs=now, ref_logprobs=now)
    loss = policy_loss(LM.apply, **POLICY | {"entropy_coef": 0.0})
    grads, metrics = grad(loss, has_aux=True)(LM.params, on_policy, KEY)
    assert metrics["kl/old"] == metrics["kl/ref"] == metrics["clip/fraction"] == 0

    def reinforce(params):
        return -(
            batch.weights * batch.advantages * logprobs(params, batch.tokens, batch.attention)
        ).sum()

    torch.testing.assert_close(grads, grad(reinforce)(LM.params), rtol=1e-9, atol=1e-12)


def test_the_entropy_bonus_pushes_along_the_gradient_of_the_entropy():
    batch = batch_of(PolicyBatch)

    def gradient(coef):
        loss = policy_loss(LM.apply, **POLICY | {"entropy_coef": coef})
        return grad(loss, has_aux=True)(LM.params, batch, KEY)[0]

    def entropy(params):
        logprobs = (LM.apply(params, batch.tokens, batch.attention) / 0.7).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        return (batch.weights[:, 1:] * entropies[:, :-1]).sum()

    pushed = tree.map(
        lambda a, b, h: a - b + 2 * h, gradient(2.0), gradient(0.0), grad(entropy)(LM.params)
    )
    # Llama's norms are float32 in a float64 model
    torch.testing.assert_close(pushed, tree.zeros_like(pushed), rtol=0, atol=2e-6)
    assert tree.global_norm(gradient(2.0)) > 0.1


def test_sparing_the_entropy_its_backward_pass_changes_no_number():
    batch, zero = batch_of(PolicyBatch), torch.zeros((), dtype=torch.float64)
    spared, whole = (
        grad(policy_loss(LM.apply, **POLICY | {"entropy_coef": c}), has_aux=True)(
            LM.params, batch, KEY
        )
        for c in (0.0, zero)
    )
    torch.testing.assert_close(spared, whole, rtol=1e-12, atol=1e-14)


def test_actor_critic_is_the_policy_loss_and_the_value_loss_of_one_backbone():
    batch = batch_of(ActorCriticBatch)
    parts = {}
    for kind in (PolicyBatch, ValueBatch):
        parts[kind] = kind(**{name: getattr(batch, name) for name in kind._fields})
    actor = policy_loss(lambda *inputs: BOTH.apply(*inputs).logits, **POLICY)
    critic = value_loss(lambda *inputs: BOTH.apply(*inputs).values, clip=0.2)
    both, metrics = CASES["actor-critic"].loss(BOTH.params, batch, KEY)
    actor_part, actor_metrics = actor(BOTH.params, parts[PolicyBatch], KEY)
    value_part, value_metrics = critic(BOTH.params, parts[ValueBatch], KEY)
    torch.testing.assert_close(both, actor_part + 0.5 * value_part)
    torch.testing.assert_close(metrics, value_metrics | actor_metrics | {"loss": both})


# Oracles: loops over rows and tokens, in Python's floats


def log_probability(logits, token, temperature=1.0):
    z = [x / temperature for x in logits.tolist()]
    top = max(z)
    return z[token] - top - math.log(sum(math.exp(x - top) for x in z))


def tokens_that_count(batch):
    return [(i, t, batch.weights[i, t].item()) for i, t in batch.weights.nonzero().tolist()]


def test_sft_loss_is_its_formula():
    batch = batch_of(SftBatch, sequence_mean)
    logits = LM.apply(LM.params, batch.tokens, batch.attention)
    expected = hits = 0.0
    for i, t, w in tokens_that_count(batch):
        expected -= w * log_probability(logits[i, t - 1], batch.tokens[i, t])
        hits += w * (logits[i, t - 1].tolist().index(logits[i, t - 1].max()) == batch.tokens[i, t])
    total, metrics = CASES["sft"].loss(LM.params, batch, KEY)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(float(hits), rel=1e-12)


def test_policy_loss_is_its_formula():
    batch = batch_of(PolicyBatch, sequence_mean)
    logits = LM.apply(LM.params, batch.tokens, batch.attention)
    expected = clipped = kl_old = kl_ref = entropies = 0.0
    for i, t, w in tokens_that_count(batch):
        logprob = log_probability(logits[i, t - 1], batch.tokens[i, t], 0.7)
        ratio = math.exp(logprob - batch.old_logprobs[i, t].item())
        advantage = batch.advantages[i, t].item()
        bounded = min(max(ratio, 0.8), 1.28)
        every = [log_probability(logits[i, t - 1], v, 0.7) for v in range(VOCAB)]
        entropy = -sum(math.exp(x) * x for x in every)
        gap = logprob - batch.ref_logprobs[i, t].item()
        surrogate = -min(ratio * advantage, bounded * advantage)
        expected += w * (surrogate + 0.3 * gap**2 / 2 - 0.05 * entropy)
        clipped += w * (bounded * advantage < ratio * advantage)
        kl_old += w * (ratio - 1 - math.log(ratio))
        kl_ref, entropies = kl_ref + w * gap, entropies + w * entropy
    total, metrics = CASES["policy"].loss(LM.params, batch, KEY)
    assert 0 < clipped < 1
    assert total.item() == pytest.approx(expected, rel=1e-12)
    for name, value in {
        "clip/fraction": clipped, "kl/old": kl_old, "kl/ref": kl_ref, "entropy": entropies,
    }.items():  # fmt: skip
        assert metrics[name].item() == pytest.approx(value, rel=1e-9), name


def test_value_loss_is_its_formula():
    batch = batch_of(ValueBatch, sequence_mean)
    values = CRITIC.apply(CRITIC.params, batch.tokens, batch.attention)
    expected, unclipped = 0.0, 0.0
    for i, t, w in tokens_that_count(batch):
        v, old, r = (x[i, t].item() for x in (values, batch.old_values, batch.returns))
        bounded = min(max(v, old - 0.2), old + 0.2)
        expected += w * 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
        unclipped += w * (v - r) ** 2
    total, metrics = CASES["value"].loss(CRITIC.params, batch, KEY)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["value/error"].item() == pytest.approx(unclipped, rel=1e-12)
    assert expected > unclipped / 2


def test_reward_loss_is_its_formula_and_a_tie_counts_one_half():
    batch = batch_of(PairBatch)
    rows = zip(batch.tokens.unbind(1), batch.attention.unbind(1))
    chosen, rejected = (SCORER.apply(SCORER.params, *side).tolist() for side in rows)
    expected = sum(math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected)) / ROWS
    total, metrics = CASES["reward"].loss(SCORER.params, batch, KEY)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    wins = sum(c > r for c, r in zip(chosen, rejected)) / ROWS
    assert metrics["accuracy"].item() == pytest.approx(wins)
    level = {name: p * 0 for name, p in SCORER.params.items()}
    assert CASES["reward"].loss(level, batch, KEY)[1]["accuracy"].item() == pytest.approx(0.5)
