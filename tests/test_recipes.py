"""Laws of the methods in recipes.py that learn from groups of answers, on a tiny Llama."""

from functools import partial

import pytest
import torch
from cases_steps import LM, VOCAB, llama
from torch.func import grad

from rlhf_fn import random, recipes, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.grpo import Asked, Roles, grpo, policy_batch, refers, samples_of
from rlhf_fn.methods import Online, answerwise
from rlhf_fn.mismatch import truncated_weights
from rlhf_fn.optim import adamw
from rlhf_fn.packing import pack
from rlhf_fn.rollout import Prompts, sample
from rlhf_fn.steps import gradient_step, next_token_logprobs, train_state
from rlhf_fn.weights import sequence_sum

METHODS = {
    name: method._replace(group=min(method.group, 4), minibatches=min(method.minibatches, 2))
    for name, method in vars(recipes).items()
    if isinstance(method, Online) and not name.startswith("_")
}
KEY = random.key(3)
ADAM = adamw(0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
each_method = pytest.mark.parametrize("name", METHODS)


def share_of_threes(rollout, records):
    threes = ((rollout.tokens == 3) & rollout.mask).sum(-1)
    return (threes / rollout.mask.sum(-1)).to(rollout.logprobs.dtype)


def roles(score=share_of_threes, method=recipes.grpo):
    draw = partial(
        sample, decoder(llama()), max_new_tokens=4, temperature=method.temperature, stop=(5,), pad=0
    )
    logprobs = next_token_logprobs(LM.apply, temperature=method.temperature)
    return Roles(draw, partial(draw, top_k=1), logprobs, LM.params, score)


def asked(number, rows=4):
    """Prompts of one token to three, so that batches differ in width."""
    widths = 1 + (torch.arange(rows) + number) % (1 + number % 3)
    attention = torch.arange(int(widths.max())) >= widths.max() - widths[:, None]
    tokens = (7 * number + torch.arange(rows)[:, None] + torch.arange(int(widths.max()))) % VOCAB
    return Asked(Prompts(tokens, attention), torch.arange(rows) + rows * number)


def iteration_of(method, score=share_of_threes, lr=0.05):
    optimizer = adamw(lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    step = gradient_step(method.loss(LM.apply), optimizer)
    return grpo(method, roles(score, method), asked, step, pad=0), train_state(LM.params, optimizer)


def drawn(method, number=0, score=share_of_threes):
    return samples_of(method, roles(score, method), LM.params, asked(number), KEY)[0]


@each_method
def test_a_method_prints_its_parts_and_its_paper(name):
    method = getattr(recipes, name)
    lines = repr(method).splitlines()
    assert [line.split()[0] for line in lines] == list(method._fields)
    assert "https://arxiv.org/abs/" in method.paper
    assert "<" not in repr(method) and "0x" not in repr(method)
    assert method._replace(group=7) != method and getattr(recipes, name) is method


@each_method
def test_a_method_teaches_what_is_rewarded(name):
    iteration, state = iteration_of(METHODS[name])
    rewards = []
    for number in range(12):
        state, metrics = iteration(state, random.fold_in(KEY, number), number)
        rewards.append(metrics["reward"].item())
    assert max(rewards[-3:]) > rewards[0] + 0.3, rewards


@each_method
def test_a_reference_is_asked_where_it_is_read_and_spoken_of_nowhere_else(name):
    method, calls = METHODS[name], []
    given, optimizer = roles(method=method), ADAM
    watched = given._replace(logprobs=lambda *x: calls.append(x) or given.logprobs(*x))
    step = gradient_step(method.loss(LM.apply), optimizer)
    iteration = grpo(method, watched, asked, step, pad=0)
    new, metrics = iteration(train_state(LM.params, optimizer), KEY, 0)
    penalised = name in {"grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax"}
    assert bool(calls) == penalised
    assert ("kl/token" in metrics) == ("kl/ref" in metrics) == penalised
    assert "kl/old" in metrics and all(x.isfinite().all() for x in tree.leaves((new, metrics)))
    assert refers(method._replace(kl_coef=0.1))
    assert refers(method._replace(advantages=lambda s: s.old_logprobs - s.ref_logprobs))


@each_method
def test_where_all_answers_are_worth_the_same_nothing_moves(name):
    iteration, state = iteration_of(
        METHODS[name], lambda rollout, records: 0 * rollout.logprobs[:, 0] + 1
    )
    new, _ = iteration(state, KEY, 0)
    gap = tree.map(lambda a, b: a - b, new.params, state.params)
    assert tree.global_norm(gap) < 1e-6, "Adam blows up what is not exactly 0"


@each_method
def test_a_method_begins_with_the_gradient_of_reinforce(name):
    method = METHODS[name]
    samples = drawn(method)
    advantages = method.advantages(samples)
    whole = getattr(method.surrogate, "func", None) is answerwise  # an answer is one action
    batch = policy_batch(samples, advantages, method.weights)
    weights = policy_batch(samples, advantages, sequence_sum if whole else method.weights).weights
    logprobs = next_token_logprobs(LM.apply, temperature=method.temperature)

    def reinforce(params):
        return -(weights * batch.advantages * logprobs(params, batch.tokens, batch.attention)).sum()

    loss = partial(method.loss(LM.apply), batch=batch, key=KEY)
    found, metrics = grad(loss, has_aux=True)(LM.params)
    torch.testing.assert_close(found, grad(reinforce)(LM.params), rtol=1e-6, atol=1e-8)
    assert metrics["clip/fraction"] == 0


@each_method
def test_an_iteration_is_a_function_of_state_key_and_number(name):
    iteration, state = iteration_of(METHODS[name])
    before = tree.map(torch.clone, state)
    first, again = (iteration(state, KEY, 1) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@each_method
def test_what_stands_outside_of_the_answers_is_never_read(name):
    method = METHODS[name]
    samples = drawn(method)
    poisoned = samples._replace(
        old_logprobs=torch.where(samples.mask, samples.old_logprobs, torch.nan),
        ref_logprobs=torch.where(samples.mask, samples.ref_logprobs, torch.nan),
    )
    clean, dirty = method.advantages(samples), method.advantages(poisoned)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (clean[~samples.mask] == 0).all()


@pytest.mark.parametrize("change", [{"kl_coef": -0.1}, {"temperature": 0.0}])
def test_a_setting_that_cannot_mean_anything_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        iteration, state = iteration_of(METHODS["grpo"]._replace(**change))
        iteration(state, KEY, 0)


def test_the_answers_of_a_prompt_stand_together():
    samples = drawn(METHODS["grpo"])
    prompts = asked(0).prompts.tokens
    width = prompts.shape[-1]
    assert (samples.tokens[..., :width] == prompts[:, None]).all()
    flat = policy_batch(samples, samples.old_logprobs, recipes.grpo.weights)
    torch.testing.assert_close(flat.tokens, samples.tokens.flatten(0, 1))


def test_a_reward_is_told_which_record_each_answer_is_for():
    seen = []

    def score(rollout, records):
        seen.append(records)
        return records.double()

    samples = drawn(METHODS["dr_grpo"], number=2, score=score)
    group = METHODS["dr_grpo"].group
    assert seen[0].tolist() == [i for i in range(8, 12) for _ in range(group)]
    assert samples.scores.tolist() == [[i] * group for i in range(8, 12)]


class Lazy:
    """Rewards that tell the answers apart only for records of odd number."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rollout, records):
        self.calls += 1
        return torch.where(records % 2 == 1, rollout.logprobs.sum(-1), 1.0)


def test_dynamic_sampling_asks_until_the_batch_is_full_of_groups_that_differ():
    reward = Lazy()
    method = METHODS["dapo"]._replace(minibatches=1, rounds=5)
    iteration, state = iteration_of(method, reward)
    _, metrics = iteration(state, KEY, 0)
    assert reward.calls == 2 and metrics["groups/kept"] == 0.5 and metrics["updates"] == 1
    assert metrics["tokens"] > 2 * 16
    iteration, state = iteration_of(method._replace(rounds=1), reward)
    assert iteration(state, KEY, 0)[1]["updates"] == 1, "half of the groups will do"


def test_without_a_group_to_learn_from_the_state_stays():
    iteration, state = iteration_of(METHODS["dapo"], lambda rollout, records: records.double())
    new, metrics = iteration(state, KEY, 0)
    assert new is state and metrics["updates"] == 0 and metrics["groups/kept"] == 0


def test_the_overlong_lose_and_the_reward_that_is_logged_stays_as_it_was():
    method = METHODS["dapo"]
    strict = method._replace(
        shaping=partial(
            method.shaping, penalty=partial(recipes.overlong_penalty, limit=4, buffer=2)
        )
    )
    lengths = drawn(method).mask.sum(-1)
    torch.testing.assert_close(
        drawn(strict).scores - drawn(method).scores, (2 - lengths).double().clamp(max=0) / 2
    )
    assert (lengths > 2).any() and (lengths <= 2).any()


def test_metrics_are_per_token_whatever_the_weights():
    def entropies(method):
        iteration, state = iteration_of(method)
        return iteration(state, KEY, 0)[1]["entropy"]

    fixed, token = (METHODS[n]._replace(minibatches=1) for n in ("dr_grpo", "grpo"))
    token = token._replace(weights=recipes.dapo.weights)
    torch.testing.assert_close(entropies(fixed), entropies(token), rtol=1e-5, atol=0)


WHOLE = {"gspo", "luspo", "gmpo", "vespo", "rloo", "topr", "kimi"}  # ratios of whole answers


@each_method
def test_answers_that_share_a_row_learn_as_they_did_or_are_refused(name):
    method = METHODS[name]
    samples = drawn(method)
    batch = policy_batch(samples, method.advantages(samples), method.weights)
    batch = batch._replace(ref_logprobs=batch.ref_logprobs.nan_to_num())
    loss, packed = method.loss(LM.apply), pack(batch, length=2 * batch.tokens.shape[-1])
    before = loss(LM.params, batch, KEY)[0]
    if name in WHOLE:
        with pytest.raises(ValueError, match="batch is packed, and the surrogate is of whole"):
            loss(LM.params, packed, KEY)
    else:
        torch.testing.assert_close(loss(LM.params, packed, KEY)[0], before)


def off_by(noise, correction):
    """Roles whose answers an engine drew that is wrong about its log-probs by as much."""

    def engine(params, prompts, keys):
        rollout = roles().sample(params, prompts, keys)
        wrong = noise * random.normal(KEY, rollout.logprobs.shape).to(rollout.logprobs)
        return rollout._replace(
            logprobs=torch.where(rollout.mask, rollout.logprobs + wrong, torch.nan)
        )

    return roles()._replace(sample=engine, correction=correction)


def test_an_engine_that_draws_from_the_policy_itself_changes_nothing():
    method = METHODS["grpo"]
    correction = partial(truncated_weights, clip=2.0)
    plain, _ = samples_of(method, roles(), LM.params, asked(0), KEY)
    own, gap = samples_of(method, off_by(0.0, correction), LM.params, asked(0), KEY)
    for name, x in plain._asdict().items():
        kept = plain.mask if x.shape == plain.mask.shape else torch.ones_like(x, dtype=torch.bool)
        torch.testing.assert_close(getattr(own, name)[kept], x[kept], equal_nan=True)
    assert gap["engine/difference"] < 1e-6 and abs(gap["engine/weight"] - 1) < 1e-6


def test_tokens_of_another_engine_weigh_the_ratio_of_its_probabilities_and_learn_from_the_policys():
    method = METHODS["grpo"]
    samples, gap = samples_of(
        method, off_by(0.5, partial(truncated_weights, clip=1.25)), LM.params, asked(0), KEY
    )
    plain, _ = samples_of(method, roles(), LM.params, asked(0), KEY)
    shape = (plain.mask.shape[0] * plain.mask.shape[1], plain.mask.shape[2])
    noise = 0.5 * random.normal(KEY, shape).to(plain.old_logprobs).view(plain.mask.shape)
    expected = torch.where(plain.mask, (-noise).exp().clamp(max=1.25), 0.0)
    torch.testing.assert_close(samples.importance, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        samples.old_logprobs[plain.mask], plain.old_logprobs[plain.mask], rtol=1e-5, atol=1e-6
    )
    most = noise[plain.mask].abs().max()
    torch.testing.assert_close(gap["engine/difference"], most, rtol=1e-5, atol=1e-6)
    batch = policy_batch(samples, method.advantages(samples), method.weights)
    weights = (method.weights(samples.mask) * expected).flatten(0, 1)
    torch.testing.assert_close(batch.weights, weights, rtol=1e-5, atol=1e-6)


def test_an_iteration_on_an_engines_answers_says_how_far_the_two_are_apart():
    method = METHODS["dapo"]._replace(keep=recipes.grpo.keep)
    step = gradient_step(method.loss(LM.apply), ADAM)
    asking = off_by(0.1, partial(truncated_weights, clip=2.0))
    iteration = grpo(method, asking, asked, step, pad=0)
    state, metrics = iteration(train_state(LM.params, ADAM), KEY, 0)
    assert 0 < metrics["engine/difference"] < 1 and 0 < metrics["engine/sample_size"] <= 1
    assert all(p.isfinite().all() for p in state.params.values())
