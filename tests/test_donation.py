"""What the runs give away is theirs: models they begin with, references, the best so far."""

from functools import partial

import pytest
import tiny
import torch
from cases_steps import CRITIC, KEY, LM
from test_ppo import METHODS, iteration_of, prompts, roles

from rlhf_fn import config as configuration
from rlhf_fn import random, recipes, stages, tree
from rlhf_fn.checkpoint import load_latest
from rlhf_fn.data import Example
from rlhf_fn.fused import fused_adamw
from rlhf_fn.heads import reward_model, value_model
from rlhf_fn.models import causal_lm, frozen
from rlhf_fn.offline import compared, prefer
from rlhf_fn.online import learn
from rlhf_fn.ppo import PpoState, near, ppo
from rlhf_fn.run import Run
from rlhf_fn.steps import donating_step, on_copies, train_state, value_loss
from rlhf_fn.train import Log
from rlhf_fn.trainable import trainable
from rlhf_fn.updates import computing, precision


def same_bits(a, b):
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        assert torch.equal(x, y)


def rows(count=6):
    """Examples of one to four tokens of prompt and of answer."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 5, (count, 2), generator=draw).tolist()
    return [
        Example(torch.randint(0, 13, (a + b,), generator=draw).tolist(), [False] * a + [True] * b)
        for a, b in sizes
    ]


MODULE = tiny.fresh("llama").float()
BASE = causal_lm(MODULE)
PAIRS = list(zip(rows(12)[:6], rows(12)[6:]))
SIZES = {"out": "", "steps": 4, "batch": 3, "every": 2, "lr": 0.05, "warmup": 0}


def sft(run, **changes):
    options = configuration.Sft(model="", data=(), **SIZES | changes)
    return BASE.params, stages.sft(options, BASE, rows(), run=run, key=KEY, pad=0)


def reward(run, **changes):
    options = configuration.Reward(model="", data=(), **SIZES | changes)
    model = reward_model(MODULE, KEY)
    return model.params, stages.reward(options, model, PAIRS, PAIRS[:2], run=run, key=KEY, pad=0)


def dpo(run, **changes):
    options = configuration.Dpo(model="", data=(), **SIZES | changes)
    model = computing(BASE, options)
    data = compared(model, PAIRS, size=3, pad=0)
    loss = recipes.dpo.loss(model.apply)
    return BASE.params, prefer(
        options, loss, BASE.params, data, data[:2], run=run, key=KEY, pad=0
    )  # fmt: skip


def grpo(run, rank=0, **changes):
    options = configuration.Grpo(model="", reward="", prompts=(), new_tokens=3, **SIZES | changes)
    method = recipes.grpo._replace(group=2, minibatches=2)
    tuned = trainable(MODULE, computing(BASE, options), rank, KEY, dtype=precision(options))
    whole = (BASE.params, tuned.model.params)
    return whole, learn(
        options, method, MODULE, tuned, lambda rollout, _: rollout.tokens[:, -1].float(),
        [row.tokens for row in rows()], run=run, key=KEY, pad=0, stop=(2,),
    )  # fmt: skip


def align(run, **changes):
    options = configuration.Ppo(model="", reward="", prompts=(), new_tokens=3, **SIZES | changes)
    scores = reward_model(MODULE, KEY)
    critic = value_model(MODULE, KEY)._replace(params=scores.params)

    def judge(rollout):
        return scores.apply(scores.params, rollout.tokens, rollout.attention)

    return scores.params, stages.align(
        options, MODULE, judge, [row.tokens for row in rows()],
        actor=causal_lm(MODULE), critic=critic, run=run, key=KEY, pad=0, stop=(2,),
    )  # fmt: skip


STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "ppo": align}
STAGES["adapter"] = partial(grpo, rank=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STAGES)
def test_a_run_never_writes_to_what_it_was_given(name, dtype, tmp_path):
    first, last = (Run(tmp_path / x, Log(tmp_path / f"{x}.jsonl")) for x in ("first", "last"))
    given, _ = STAGES[name](first, steps=1, dtype=dtype)
    before = tree.map(torch.clone, (given, BASE.params, dict(MODULE.named_parameters())))
    given, tuned = STAGES[name](last, dtype=dtype)
    same_bits((given, BASE.params, dict(MODULE.named_parameters())), before)
    start = given[1] if isinstance(given, tuple) else given
    if start.keys() == tuned.keys():
        assert any(not torch.equal(p, start[n]) for n, p in tuned.items())
    assert {p.dtype for p in tuned.values()} == {torch.float32}
    saved = load_latest(next((last.directory / "checkpoints").iterdir())).tensors.values()
    assert not any(x.dtype == torch.bfloat16 for x in saved)


def test_the_best_reward_model_is_the_one_that_was_best_then(tmp_path):
    """A learning rate at which the held-out loss soon rises."""
    run = Run(tmp_path / "run", Log(tmp_path / "metrics.jsonl"))
    options = configuration.Reward(model="", data=(), **SIZES | {"steps": 10, "lr": 0.5})
    model, held = reward_model(MODULE, KEY), PAIRS[:2]
    best = stages.reward(options, model, PAIRS[2:], held, run=run, key=KEY, pad=0)
    losses = [r["held-out loss"] for r in run.log.records() if "held-out loss" in r]
    assert min(losses) < losses[-1]
    found, _ = stages.preferences(model.apply, best, held, 0)
    assert found == pytest.approx(min(losses), rel=1e-6)


def test_an_actor_that_goes_too_far_is_not_followed_by_a_run_that_writes_over_it(tmp_path):
    run = Run(tmp_path / "run", Log(tmp_path / "metrics.jsonl"))
    align(run, max_kl=1e-4, epochs=3, minibatches=1)
    made = sum(record["updates"] for record in run.log.records())
    saved = load_latest(run.checkpoints("ppo")).tensors
    assert saved["actor/step"] == saved["actor/opt_state/count"] == made < 4 * 3


def donating(method, wrap):
    """An iteration of PPO whose steps write, or do so on copies, and its state."""
    optimizer = fused_adamw(0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    actor = donating_step(method.loss(LM.apply), optimizer, accept=near(method))
    critic = donating_step(value_loss(CRITIC.apply, clip=method.value_clip), optimizer)
    state = PpoState(
        train_state(frozen(LM.params), optimizer),
        train_state(frozen(CRITIC.params), optimizer),
        torch.tensor(method.kl_reward, dtype=torch.float64),
    )
    return ppo(method, roles(), prompts, wrap(actor), wrap(critic)), state


@pytest.mark.parametrize("max_kl", [1e-3, torch.inf])
def test_ppo_that_writes_over_its_state_has_the_bits_of_ppo_that_does_not(max_kl):
    """With the small one, the second step of the actor is made by neither."""
    method = METHODS["ppo"]._replace(epochs=3, minibatches=1, max_kl=max_kl)
    ends = []
    for wrap in (on_copies, lambda step: step):
        iteration, state = donating(method, wrap)
        history = []
        for number in range(2):
            state, metrics = iteration(state, random.fold_in(KEY, number), number)
            history.append(tree.map(torch.clone, (state, metrics)))
        ends.append(history)
    same_bits(*ends)
    (first, metrics), _ = ends[0]
    assert metrics["updates"] == first.actor.step == (1 if max_kl < 1 else 3)


def test_ppo_that_writes_follows_the_formula():
    method = METHODS["ppo"]._replace(epochs=3, minibatches=1, max_kl=1e-3)
    (plain, start), (iteration, state) = iteration_of(method), donating(method, lambda step: step)
    expected, told = plain(start, KEY, 0)
    state, metrics = iteration(state, KEY, 0)
    torch.testing.assert_close((state.actor, state.critic), (expected.actor, expected.critic))
    torch.testing.assert_close(metrics, told)
