"""Laws of the methods with a critic, PPO and VAPO, on a tiny Llama."""

from functools import partial

import pytest
import torch
from cases_steps import CRITIC, KEY, LM, POLICY, VOCAB, batch_of, llama, ragged, real
from torch.func import grad

from rlhf_fn import random, recipes, tree
from rlhf_fn.decoding import decoder
from rlhf_fn.kl import adaptive_kl
from rlhf_fn.losses import ImitationBatch, SftBatch
from rlhf_fn.methods import ActorCritic, length_adaptive_gae
from rlhf_fn.optim import adamw
from rlhf_fn.ppo import PpoState, Roles, experience, ppo
from rlhf_fn.returns import discounted_returns, gae
from rlhf_fn.rewards import whiten
from rlhf_fn.rollout import Prompts, sample
from rlhf_fn.steps import (
    PolicyBatch,
    gradient_step,
    next_token_logprobs,
    policy_loss,
    sft_loss,
    train_state,
    value_loss,
)

METHODS = {n: m for n, m in vars(recipes).items() if isinstance(m, ActorCritic)}
QUICK = {"minibatches": 2, "critic_first": 0}


def share_of_threes(rollout):
    return ((rollout.tokens == 3) & rollout.mask).sum(-1).double() / rollout.mask.sum(-1) - 0.2


def roles(score=share_of_threes):
    draw = partial(
        sample, decoder(llama()), max_new_tokens=4, temperature=1.0, stop=(5,), pad=0
    )  # fmt: skip
    return Roles(draw, next_token_logprobs(LM.apply), CRITIC.apply, LM.params, score)


def prompts(number):
    tokens = (7 * number + torch.arange(8)[:, None]) % VOCAB
    return Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))


def iteration_of(method, score=share_of_threes, lr=0.05):
    optimizer = adamw(lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    actor = gradient_step(method.loss(LM.apply), optimizer)
    critic = gradient_step(value_loss(CRITIC.apply, clip=method.value_clip), optimizer)
    state = PpoState(
        train_state(LM.params, optimizer),
        train_state(CRITIC.params, optimizer),
        torch.tensor(method.kl_reward, dtype=torch.float64),
    )
    return ppo(method, roles(score), prompts, actor, critic), state


def test_the_methods_are_ppo_and_vapo():
    assert sorted(METHODS) == ["ppo", "vapo"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_prints_its_parts_and_its_paper(name):
    lines = repr(METHODS[name]).splitlines()
    assert [line.split()[0] for line in lines] == list(ActorCritic._fields)
    assert "https://arxiv.org/abs/" in lines[0] and "0x" not in repr(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_teaches_what_is_rewarded(name):
    iteration, state = iteration_of(METHODS[name]._replace(**QUICK))
    rewards = []
    for number in range(15):
        state, metrics = iteration(state, random.fold_in(KEY, number), number)
        rewards.append(metrics["reward"].item())
    assert max(rewards[-3:]) > rewards[0] + 0.3, rewards


def test_the_critic_learns_first_where_the_method_says_so():
    iteration, state = iteration_of(METHODS["vapo"]._replace(minibatches=2, critic_first=2))
    same = partial(torch.testing.assert_close, rtol=0, atol=0)
    for number in range(2):
        new, metrics = iteration(state, KEY, number)
        same(new.actor, state.actor)
        assert tree.global_norm(tree.map(torch.sub, new.critic.params, state.critic.params)) > 1e-3
        assert metrics["updates"] == 2 and "policy" not in metrics
        state = new
    new, _ = iteration(state, KEY, 2)
    assert tree.global_norm(tree.map(torch.sub, new.actor.params, state.actor.params)) > 1e-3


def test_an_actor_that_goes_too_far_is_not_followed():
    method = METHODS["ppo"]._replace(epochs=3, minibatches=1, max_kl=1e-3)
    iteration, state = iteration_of(method)
    new, metrics = iteration(state, KEY, 0)
    assert metrics["updates"] == new.actor.step == new.critic.step == 1
    _, metrics = iteration_of(method._replace(max_kl=torch.inf))[0](state, KEY, 0)
    assert metrics["updates"] == 3


def test_the_penalty_is_inside_of_the_reward_and_the_score_on_the_last_token():
    method = METHODS["ppo"]
    other = {name: p + 0.1 * torch.randn_like(p) for name, p in LM.params.items()}
    asked = prompts(0)
    rollout = roles().sample(LM.params, asked, random.split(KEY, 8))
    state = iteration_of(method)[1]
    seen = experience(method, roles()._replace(reference=other), state, rollout)
    ref = roles().logprobs(other, rollout.tokens, rollout.attention)
    gap = torch.where(rollout.mask, rollout.logprobs - ref, 0.0)
    last = rollout.mask & (rollout.mask.flip(-1).cumsum(-1).flip(-1) == 1)
    rewards = torch.where(last, share_of_threes(rollout)[:, None], 0.0) - 0.02 * gap
    advantages, returns = gae(rewards, seen.old_values, rollout.mask, discount=1.0, lam=0.95)
    advantages = whiten(advantages, rollout.mask, eps=1e-8, shift_mean=True)
    torch.testing.assert_close((seen.advantages, seen.returns), (advantages, returns))


def test_the_price_of_the_kl_follows_that_of_whole_answers_to_the_reference():
    other = {name: 1.5 * p for name, p in LM.params.items()}
    rollout = roles().sample(LM.params, prompts(0), random.split(random.split(KEY, 3)[0], 8))
    ref = roles().logprobs(other, rollout.tokens, rollout.attention)
    kl = torch.where(rollout.mask, rollout.logprobs - ref, 0.0).sum(-1).mean().item()
    assert kl > 0.1 and (rollout.mask.sum(-1) > 1).any()  # else a sequence would be a token
    steering = {"target_kl": 0.9 * kl, "horizon": 16.0}
    method = METHODS["ppo"]._replace(**steering, **QUICK)

    def stay(train, batch, key):
        return train, {"kl/old": torch.tensor(0.0), "loss": torch.tensor(0.0)}

    iteration = ppo(method, roles()._replace(reference=other), prompts, stay, stay)
    state = iteration_of(method)[1]
    price = adaptive_kl(state.kl_coef, kl, target=0.9 * kl, horizon=16.0, tokens=8)
    torch.testing.assert_close(iteration(state, KEY, 0)[0].kl_coef, price)


def test_of_good_answers_the_likelihood_is_raised_by_itself():
    batch = batch_of(PolicyBatch)
    good = torch.where(torch.arange(len(batch.tokens))[:, None] % 2 == 0, batch.weights, 0.0)
    loss = policy_loss(LM.apply, **POLICY | {"temperature": 1.0})
    gradient = grad(loss, has_aux=True)
    found, metrics = gradient(LM.params, ImitationBatch(*batch, imitation=0.1 * good), KEY)
    plain, _ = gradient(LM.params, batch, KEY)
    tutor = grad(sft_loss(LM.apply), has_aux=True)
    nll, told = tutor(LM.params, SftBatch(batch.tokens, batch.attention, 0.1 * good), KEY)
    # Llama's norms are float32 in a float64 model
    torch.testing.assert_close(found, tree.add(plain, nll), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["imitation"], told["loss"])


def test_only_answers_with_a_score_above_zero_are_imitated():
    seen = []

    def watched(state, batch, key):
        seen.append(batch)
        return state, {"loss": torch.zeros(()), "kl/old": torch.zeros(())}

    method = METHODS["vapo"]._replace(minibatches=1, critic_first=0)
    score = lambda rollout: torch.tensor([1.0, -1.0, 0.0, 2.0] * 2, dtype=torch.float64)  # noqa: E731
    _, state = iteration_of(method)
    ppo(method, roles(score), prompts, watched, watched)(state, KEY, 0)
    actor = seen[0]
    raised = (actor.imitation > 0).any(-1)
    assert raised.sum() == 4
    torch.testing.assert_close(actor.imitation.sum().item(), 0.1)
    assert ((actor.imitation > 0) == (actor.weights > 0) & raised[:, None]).all()


def test_the_actors_lambda_grows_with_the_answer_and_the_critics_is_one():
    torch.manual_seed(0)
    _, _, mask = ragged(rows=6, time=9)
    rewards, values = real(6, 9), real(6, 9)
    advantages, returns = length_adaptive_gae(rewards, values, mask, alpha=0.5)
    torch.testing.assert_close(
        torch.where(mask, returns, 0.0), discounted_returns(rewards, mask, discount=1.0)
    )
    rows = []
    for r, v, m in zip(rewards, values, mask):
        lam = max(0.0, 1 - 1 / (0.5 * max(int(m.sum()), 1)))
        rows.append(gae(r, v, m, discount=1.0, lam=lam).advantages)
    expected = whiten(torch.stack(rows), mask, eps=1e-8, shift_mean=True)
    torch.testing.assert_close(advantages, expected)
