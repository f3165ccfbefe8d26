"""Every published method of pairs, against its formula written out over lists of numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from cases_pairs import FORMULAS, a, b, h, means
from cases_steps import EVENLY, KEY, LM, ROWS, TIME, dpo_batch

from rlhf_fn import pair_recipes, recipes
from rlhf_fn.direct import bco_pair, ipo
from rlhf_fn.optim import adamw
from rlhf_fn.pair_losses import Answers
from rlhf_fn.pair_methods import Offline, of_means, of_sums
from rlhf_fn.preference import dpo
from rlhf_fn.steps import DpoBatch, functional_gradient, gradient_step, train_state

RECIPES = {name: x for name, x in vars(pair_recipes).items() if isinstance(x, Offline)}
each_recipe = pytest.mark.parametrize("name", RECIPES)


def batch_for(method) -> DpoBatch:
    torch.manual_seed(2)
    batch = dpo_batch(answers=4 if method.mismatched else 2)
    if method.mismatched:  # KTO's baseline is not 0 where the reference likes them less
        batch.ref_logprobs[:, 2:] -= 4
    return batch if method.reference else batch._replace(ref_logprobs=0 * batch.ref_logprobs)


def pairs_of(batch):
    """Each pair's log-probs, token by token in ordinary numbers, and their sums and counts."""
    pairs = []
    for i in range(ROWS):
        lists = []
        for j in range(batch.tokens.shape[1]):
            tokens, attention = batch.tokens[i, j], batch.attention[i, j]
            logits = LM.apply(LM.params, tokens[None], attention[None])[0].tolist()
            at = batch.mask[i, j].nonzero()[:, 0].tolist()
            now = [logits[t - 1][tokens[t]] - log_sum_exp(logits[t - 1]) for t in at]
            lists.append((now, [batch.ref_logprobs[i, j, t].item() for t in at]))
        (ws, rws), (ls, rls), *others = lists
        extra = {f"x{k}": sum(now) - sum(ref) for k, (now, ref) in enumerate(others, 3)}
        pairs.append(
            SimpleNamespace(
                ws=ws, rws=rws, ls=ls, rls=rls, nw=len(ws), nl=len(ls), w=sum(ws), rw=sum(rws),
                l=sum(ls), rl=sum(rls), **extra,
            )
        )  # fmt: skip
    return pairs


def log_sum_exp(x):
    return max(x) + math.log(sum(math.exp(z - max(x)) for z in x))


@each_recipe
def test_the_loss_of_a_recipe_is_the_formula_of_its_paper(name):
    method = RECIPES[name]
    batch = batch_for(method)
    pairs = pairs_of(batch)
    total, metrics = method.loss(LM.apply)(LM.params, batch, KEY)
    assert total.item() == metrics["loss"].item()
    assert total.item() == pytest.approx(FORMULAS[name](pairs), rel=1e-9)
    per_token = method.reward.__name__.endswith("per_token")
    rewards = [means(p) if per_token else p for p in pairs]
    assert metrics["accuracy"].item() == pytest.approx(sum(h(p) > 0 for p in rewards) / ROWS)
    assert metrics["reward/chosen"].item() == pytest.approx(sum(map(a, rewards)) / ROWS)
    assert metrics["reward/rejected"].item() == pytest.approx(sum(map(b, rewards)) / ROWS)
    assert metrics["logprob/rejected"].item() == pytest.approx(
        sum(means(p).l for p in pairs) / ROWS
    )


def test_a_policy_that_is_its_reference_has_ties_which_count_one_half():
    batch, method = batch_for(RECIPES["dpo"]), RECIPES["dpo"]
    rows = batch.tokens.flatten(0, 1), batch.attention.flatten(0, 1)
    logits = LM.apply(LM.params, *rows)[:, :-1].log_softmax(-1)
    now = logits.gather(-1, rows[0][:, 1:, None])[..., 0]
    now = torch.nn.functional.pad(now, (1, 0)).view_as(batch.ref_logprobs)
    total, metrics = method.loss(LM.apply)(LM.params, batch._replace(ref_logprobs=now), KEY)
    torch.testing.assert_close(total, torch.tensor(math.log(2)).double())
    assert metrics["accuracy"] == 0.5


@each_recipe
def test_a_recipe_trains_its_loss_falls_and_its_margin_rises(name):
    method = RECIPES[name]
    batch, optimizer = batch_for(method), adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    step, state = gradient_step(method.loss(LM.apply), optimizer), train_state(LM.params, optimizer)
    seen = []
    for _ in range(8):
        state, metrics = step(state, batch, KEY)
        seen.append(metrics)
    margins = [(m["reward/chosen"] - m["reward/rejected"]).item() for m in seen]
    assert seen[-1]["loss"] < seen[0]["loss"] and margins[-1] > margins[0]
    assert all(m["finite"] == 1 for m in seen)


def test_ipo_takes_every_margin_to_its_target():
    """Where all pairs can be fitted the optimum is known: (ā − b̄) = 1/(2β)."""
    method = RECIPES["ipo"]._replace(objective=of_means(ipo, beta=1.0))
    batch, optimizer = batch_for(method), adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0)
    step, state = gradient_step(method.loss(LM.apply), optimizer), train_state(LM.params, optimizer)
    for _ in range(200):
        state, metrics = step(state, batch, KEY)
    margin = metrics["reward/chosen"] - metrics["reward/rejected"]
    assert metrics["loss"] < 1e-4 and metrics["accuracy"] == 1
    torch.testing.assert_close(margin, torch.tensor(0.5).double(), rtol=0, atol=0.01)


def test_the_shift_of_bco_is_held_constant():
    method = RECIPES["bco"]
    batch = batch_for(method)
    grads, (_, metrics) = functional_gradient(method.loss(LM.apply))(LM.params, batch, KEY)
    shift = 0.01 * (metrics["reward/chosen"] + metrics["reward/rejected"]).item() / 2
    constant = method._replace(objective=of_sums(bco_pair, beta=0.01, shift=shift))
    expected, _ = functional_gradient(constant.loss(LM.apply))(LM.params, batch, KEY)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)


@each_recipe
def test_pairs_of_one_token_have_finite_gradients(name):
    method = RECIPES[name]
    batch = batch_for(method)
    last = batch.attention & (batch.attention.cumsum(-1) == batch.attention.sum(-1, True))
    grads, (total, _) = functional_gradient(method.loss(LM.apply))(
        LM.params, batch._replace(mask=last), KEY
    )
    assert total.isfinite() and all(g.isfinite().all() for g in grads.values())
    assert any((g != 0).any() for g in grads.values())


@each_recipe
def test_what_the_masks_and_the_weights_hide_is_never_read(name):
    method = RECIPES[name]
    batch = batch_for(method)
    weights = EVENLY.where(torch.arange(ROWS) != 2, 0.0)
    clean = batch._replace(weights=weights)
    shown = batch.mask & (weights != 0)[:, None, None]
    dirty = clean._replace(ref_logprobs=torch.where(shown, batch.ref_logprobs, torch.nan))
    gradient = functional_gradient(method.loss(LM.apply))
    torch.testing.assert_close(
        gradient(LM.params, dirty, KEY), gradient(LM.params, clean, KEY), rtol=0, atol=0
    )


@each_recipe
def test_micro_batches_change_the_step_of_those_methods_that_say_so_and_of_no_other(name):
    method = RECIPES[name]
    batch = batch_for(method)
    gradient = functional_gradient(method.loss(LM.apply))
    whole, _ = gradient(LM.params, batch, KEY)
    parts = [gradient(LM.params, DpoBatch(*(x[i] for x in batch)), KEY)[0]
             for i in (slice(0, 2), slice(2, ROWS))]  # fmt: skip
    gaps = [(whole[n] - parts[0][n] - parts[1][n]).abs().max() for n in whole]
    size = max(g.abs().max() for g in whole.values())
    assert (max(gaps) > 1e-6 * size) == method.whole


@each_recipe
def test_a_recipe_reads_a_reference_and_mismatched_answers_where_it_says_so_and_only_there(name):
    method = RECIPES[name]
    batch = batch_for(method)

    def loss_with(ref_logprobs):
        return method.loss(LM.apply)(LM.params, batch._replace(ref_logprobs=ref_logprobs), KEY)[0]

    before, ramp = loss_with(batch.ref_logprobs), torch.arange(TIME).double() / 10
    for answer in range(batch.tokens.shape[1]):
        other = batch.ref_logprobs.clone()
        other[:, answer] += ramp
        assert (loss_with(other) != before) == method.reference
    assert (batch.tokens.shape[1] == 4) == method.mismatched


@pytest.mark.compile
@each_recipe
def test_an_objective_is_one_graph_with_the_same_numbers(name):
    method = RECIPES[name]
    batch = batch_for(method)
    now = batch.ref_logprobs - torch.rand_like(batch.ref_logprobs)
    answers = [
        Answers(*x) for x in zip(*(y.unbind(1) for y in (now, batch.ref_logprobs, batch.mask)))
    ]
    torch._dynamo.reset()
    compiled = torch.compile(method.objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*answers), method.objective(*answers))


@each_recipe
def test_a_recipe_is_a_value_that_prints_as_its_settings_and_changes_by_replacement(name):
    method = RECIPES[name]
    text = repr(method)
    assert getattr(recipes, name) is method
    assert [line.split()[0] for line in text.splitlines()] == list(method._fields)
    assert "<" not in text and " at 0x" not in text and "http" in method.paper
    other = method._replace(objective=RECIPES["dpo"].objective)
    assert other.reward is method.reward and (other == method) == (name == "dpo")


def test_every_recipe_has_its_formula_here():
    assert FORMULAS.keys() == RECIPES.keys()


@pytest.mark.parametrize("beta", [-0.1, 0.0, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta):
    method = RECIPES["dpo"]._replace(objective=of_sums(dpo, beta=beta))
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        method.loss(LM.apply)(LM.params, batch_for(method), KEY)
