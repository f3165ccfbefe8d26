"""What TRL makes of a model and of rewards against ours: log-probs, advantages, references.

TRL's own code runs (1.16 is what was compared with); it is no dependency.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip(
    "trl", minversion="1.16", reason="compared with TRL where it is installed: pip install trl"
)

import tiny  # noqa: E402
import torch  # noqa: E402
from agreement import ALONE, difference, ragged, trainer  # noqa: E402
from torch.nn.functional import pad  # noqa: E402
from trl import GRPOTrainer, RLOOTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.rewards import get_soft_overlong_punishment  # noqa: E402
from trl.trainer.callbacks import SyncRefModelCallback  # noqa: E402
from trl.trainer.utils import add_fused_lm_head, selective_log_softmax_and_entropy  # noqa: E402

import rlhf_fn as fn  # noqa: E402
from rlhf_fn.models import causal_lm, on_next_token  # noqa: E402

SAME = 1e-5


def logits(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(*shape, generator=draw)


def both(logits, ids, **settings):
    return fn.token_logprobs(logits, ids, **settings), fn.entropy(logits, **settings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probs_and_entropies_of_logits_are_those_of_trl(temperature, seed):
    z = logits(seed, 4, 7, 13).requires_grad_()
    ids = torch.randint(0, 13, (4, 7), generator=torch.Generator().manual_seed(seed))
    theirs = selective_log_softmax_and_entropy(z, ids, temperature=temperature)
    ours = both(z, ids, temperature=temperature)
    assert max(difference(a, b, z) for a, b in zip(theirs, ours)) < SAME


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_log_probs_and_entropies_of_a_model_are_those_of_trl(side, temperature):
    module = tiny.fresh("llama").float().eval()
    mask = ragged(0).mask if side == "right" else ragged(0).mask.flip(-1)
    ids = torch.randint(0, tiny.VOCAB, mask.shape)
    params = dict(module.named_parameters())
    raw = causal_lm(module).apply(params, ids, mask)
    ours = on_next_token(both)(raw, ids, temperature=temperature)

    add_fused_lm_head(module, temperature=temperature, outputs=("log_probs", "entropy"))
    inputs = {
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),  # TRL leaves them to its data
    }
    out = module(input_ids=ids, **inputs, fused_lm_head=True)
    scored = mask & pad(mask[:, :-1], (1, 0))  # nothing comes before the first token of a row
    mixture = torch.linspace(-1, 1, mask.numel()).reshape(mask.shape)
    for theirs, mine in zip((out.log_probs, out.entropy), ours):
        pair = [torch.where(scored, x * mixture, 0.0).sum() for x in (pad(theirs, (1, 0)), mine)]
        assert difference(*pair, *params.values()) < SAME


def answers(seed):
    """Pairs behind prompts of three tokens: logits, ids, where there is a token, and an answer."""
    mask = ragged(seed).mask
    inside = pad(mask, (3, 0), value=True)
    ids = torch.randint(0, 13, inside.shape, generator=torch.Generator().manual_seed(seed))
    return logits(seed, *inside.shape, 13).requires_grad_(), ids, inside, pad(mask, (3, 0))


def without_reference(kind, z, ids, inside, mask, **settings):
    """The loss of TRL's ORPOTrainer or CPOTrainer, of a model that answers with these logits."""
    made = trainer(kind, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **settings)
    rows = {
        "input_ids": ids,
        "attention_mask": inside.long(),
        "labels": ids.masked_fill(~mask, -100),
    }
    batch = {
        f"{name}_{field}": part
        for field, pair in rows.items()
        for name, part in zip(("chosen", "rejected"), pair.chunk(2))
    }
    return made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=z), batch)[0]


def likelihoods(z, ids, inside, mask, of):
    return of(on_next_token(fn.token_logprobs)(z, ids), mask).chunk(2)


def likelihood(z, ids, inside, mask):
    """−log π of the chosen rows, every token of the batch alike."""
    per_token = on_next_token(fn.token_logprobs)(z, ids).chunk(2)[0]
    counted = mask.chunk(2)[0].clone()
    counted[:, 0] = False
    return fn.weighted_sum(-per_token, fn.token_mean(counted))


CPO = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}


@pytest.mark.parametrize("seed", range(5))
def test_simpo_of_the_logits_of_a_model_is_that_of_trl(seed):
    case = answers(seed)
    theirs = without_reference(CPOTrainer, *case, loss_type="simpo", cpo_alpha=0, beta=2.0, **CPO)
    ours = fn.simpo(*likelihoods(*case, of=fn.masked_mean), beta=2.0, margin=0.5).mean()
    assert difference(theirs, ours, case[0]) < SAME


def cpo(case):
    return without_reference(CPOTrainer, *case, loss_type="sigmoid", cpo_alpha=1, beta=0.1, **CPO)


def orpo(case):
    return without_reference(ORPOTrainer, *case, beta=0.1)


def odds(case):
    """The part of `orpo` that has a coefficient."""
    pair = likelihoods(*case, of=fn.masked_mean)
    return (fn.orpo(*pair, coef=0.1) - fn.orpo(*pair, coef=0.0)).mean()


# what differs -> (why, theirs, ours with the same setting, ours that is theirs)
DIFFERENCES = {
    "the likelihood of cpo": (
        "TRL's is a mean over all tokens of a batch; the paper's, and ours, of whole answers",
        cpo,
        lambda c: fn.cpo(*likelihoods(*c, of=fn.masked_sum), beta=0.1, alpha=1.0).mean(),
        lambda c: (
            fn.cpo(*likelihoods(*c, of=fn.masked_sum), beta=0.1, alpha=0.0).mean() + likelihood(*c)
        ),
    ),
    "the likelihood of orpo": (
        "TRL's is a mean over all tokens of a batch, prompts too; ours is of each answer per token",
        orpo,
        lambda c: fn.orpo(*likelihoods(*c, of=fn.masked_mean), coef=0.1).mean(),
        lambda c: odds(c) + likelihood(*c[:3], c[2]),
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_a_loss_of_logits_differs_from_trl_it_differs_by_what_is_said(name):
    why, theirs, ours, reconciled = DIFFERENCES[name]
    case = answers(3)
    assert difference(theirs(case), ours(case), case[0]) > 100 * SAME, why
    assert difference(theirs(case), reconciled(case), case[0]) < SAME, why


def advantages(kind, rewards, **settings):
    """What TRL's trainer makes of rewards [prompts, group, objectives]; NaN is no reward."""
    prompts, group, objectives = rewards.shape
    number = prompts * group
    names = [f"reward {i}" for i in range(objectives)]
    common = {
        "_generate": lambda prompts: (
            ([[1]] * number, [[1]] * number, [""] * number)
            if kind is RLOOTrainer
            else ([[1]] * number, [[1]] * number, None, [""] * number, None, {}, None, None)
        ),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (torch.zeros(number, 1), None, None),
        "_calculate_rewards": lambda *_: rewards.flatten(0, 1),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {}, "_pending_metrics": {},
        "accelerator": SimpleNamespace(**vars(ALONE), process_index=0),
        "args": SimpleNamespace(
            steps_per_generation=1, gradient_accumulation_steps=1, per_device_eval_batch_size=1,
            gradient_checkpointing_kwargs=None, report_to=[],
        ),
        "reward_funcs": names, "reward_func_names": names, "num_generations_eval": group,
        "reward_weights": torch.ones(objectives), "num_iterations": 1, "beta": 0.0, "tools": None,
        "use_vllm": False, "mask_truncated_completions": False, "pad_to_multiple_of": None,
        "multi_objective_aggregation": "sum_then_normalize", "reward_clip_range": None,
        "normalize_advantages": False, "environment_factories": None, "environments": None,
    }  # fmt: skip
    made = trainer(kind, **common | settings)
    out = made._generate_and_score_completions([{"prompt": ""}] * number)
    return out["advantages"].reshape(prompts, group)


def scores(seed, objectives=1):
    """Rewards of groups of five and which of them there are."""
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(4, 5, objectives, generator=draw)
    mask = torch.rand(4, 5, generator=draw) > 0.3
    return rewards, mask


HOW = {"ddof": 1, "eps": 1e-4}
GROUPS = {
    "group": (GRPOTrainer, {"scale_rewards": "group"}, partial(fn.grpo_advantages, **HOW)),
    "none": (GRPOTrainer, {"scale_rewards": "none"}, fn.dr_grpo_advantages),
    "batch": (GRPOTrainer, {"scale_rewards": "batch"}, partial(fn.lite_ppo_advantages, **HOW)),
    "rloo": (RLOOTrainer, {}, fn.rloo_advantages),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", GROUPS)
def test_advantages_of_groups_are_those_of_trl(name, seed):
    kind, settings, ours = GROUPS[name]
    rewards, mask = scores(seed)
    mask[0] = torch.arange(5) == 2  # one reward of the group is known
    theirs = advantages(kind, rewards.masked_fill(~mask[..., None], torch.nan), **settings)
    if name == "group":  # TRL's std of one reward is NaN, which it turns into 0
        assert (theirs[0] == 0).all()
    assert difference(theirs, ours(rewards[..., 0], mask)) < SAME


@pytest.mark.parametrize("seed", range(5))
def test_gdpo_advantages_are_those_of_trl(seed):
    rewards, _ = scores(seed, objectives=2)
    weights = torch.tensor([0.3, 1.0])
    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    theirs = advantages(GRPOTrainer, rewards, **settings)
    assert difference(theirs, fn.gdpo_advantages(rewards, weights=weights, **HOW)) < SAME


def test_equal_rewards_have_advantages_of_exactly_zero_and_in_trl_what_rounding_leaves():
    """TRL divides the rounding of the mean by ε; here equal rewards are 0 before any rounding."""
    rewards = torch.full((4, 6, 1), 1000.1)
    theirs = advantages(GRPOTrainer, rewards, scale_rewards="group")
    assert (theirs.abs() > 0.1).all()
    assert (fn.grpo_advantages(rewards[..., 0], **HOW) == 0).all()


def test_the_penalty_of_overlong_answers_is_that_of_trl():
    lengths = torch.arange(1, 30)
    theirs = get_soft_overlong_punishment(16, 8)(completion_ids=[[0] * n for n in lengths])
    ours = fn.overlong_penalty(lengths, limit=16, buffer=8)
    assert difference(torch.tensor(theirs), ours) < SAME


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_a_soft_update_is_that_of_trl(rate):
    old, new = tiny.fresh("llama", 0), tiny.fresh("llama", 1)
    params = [dict(x.named_parameters()) for x in (old, new)]
    ours = fn.soft_update(*params, rate=rate)
    SyncRefModelCallback._sync_target_model(new, old, rate)
    assert max(difference(p, ours[name]) for name, p in old.named_parameters()) < SAME
