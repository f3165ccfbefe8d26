"""Public functions of other libraries, adapted to the kinds that `rlhf_fn.laws` knows.

Nothing of theirs is replaced: each is called as its documentation says. A library is a function
that imports it and yields its `Peer`s.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

CLIP = {"clip_low": 0.2, "clip_high": 0.2}
GAE = {"discount": 0.9, "lam": 0.8}
HOLES = ["Hidden tokens in the middle are as if cut out"]  # not asked of what has no mask
NAN = ["NaN under the mask reaches neither the loss nor its gradient"]

BF16 = {"bf16": "definition: half precision in, half precision out; give it float32"}
BANNED = {"-inf": "bug: 0 · -inf is NaN where a token is banned (TRL #7221, SkyRL #2259)"}
TIMES_MASK = {"NaN": "precondition, not stated: padding holds finite numbers (it multiplies by 0)"}
NO_TOKEN = {
    "nothing is kept": "precondition: the trainer gives the token count of the whole batch; "
    "without it an empty micro-batch is 0/0"
}
ONE_ANSWER = {"without company": "definition: an answer alone keeps its raw reward, by design"}
NOT_ZEROED = {"Hidden values": "definition: padding is left to a later mask (verl #1527)"}


class Peer(NamedTuple):
    """A function, its kind and settings, and what was judged of the laws with these words."""

    name: str
    function: Callable[..., Any]
    like: str
    settings: dict[str, float] = {}
    judged: dict[str, str] = {}
    skip: list[str] = []


def trl() -> Iterator[Peer]:
    """TRL: https://github.com/huggingface/trl"""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    device = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        beta=1.0, alpha=0.0, loss_type="sigmoid", label_smoothing=0.0, accelerator=device
    )
    slope = (
        "bug: at a mean log-prob of -1e-9 the branch of log1mexp that is not taken has an infinite "
        "slope, and 0 · inf is NaN"
    )
    tau = {"temperature": 0.7}
    yield Peer("selective_log_softmax", selective_log_softmax, "logprobs", tau, BF16)
    yield Peer("entropy_from_logits", entropy_from_logits, "entropy", {}, BANNED)
    yield Peer(
        "ORPOTrainer.odds_ratio_loss",
        lambda chosen, rejected: -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0],
        "odds ratio",
        judged={"nearly certain": slope},
    )
    yield Peer(
        "CPOTrainer.cpo_loss, sigmoid",
        lambda chosen, rejected: CPOTrainer.cpo_loss(trainer, chosen, rejected)[0],
        "reward loss",
    )


def torchtune() -> Iterator[Peer]:
    """torchtune: https://github.com/meta-pytorch/torchtune"""
    from torchtune import rlhf
    from torchtune.rlhf.loss import DPOLoss, PPOLoss, RSOLoss

    def policy(logprobs, old_logprobs, advantages, mask):
        nought = torch.zeros_like(logprobs)
        loss = PPOLoss(epsilon=0.2, value_coeff=0.0)
        return loss(old_logprobs, logprobs, advantages, nought, nought, nought, mask, mask)[0]

    def value(values, old_values, returns, mask):
        nought = torch.zeros_like(values)
        loss = PPOLoss(value_clip_range=0.2, value_coeff=1.0)
        return loss(nought, nought, nought, old_values, values, returns, mask, mask)[0]

    def before_whitening(rewards, values, mask):
        _, returns = rlhf.estimate_advantages(values, rewards, 0.9, 0.8, mask)
        return returns - values, returns

    def token_rewards(score, logprobs, ref_logprobs, mask):
        last = mask.sum(-1) - 1
        return rlhf.get_rewards_ppo(score, logprobs, ref_logprobs, 0.1, last)[0]

    white = TIMES_MASK | NOT_ZEROED | {"One kept": "bug, at the edge: NaN (ROLL #475)"}
    added = (
        "bug, of its caller: the default adds the mean back, as TRL's does for shift_mean=False, "
        "so the advantages of its PPO are not centred"
    )
    of_its_caller = (
        "precondition, of its caller: the recipe sets values and log-probs of padding to "
        "constants, for the mask is for the whitening alone"
    )
    zeroed = dict.fromkeys(["never read", "NaN", "recursion", "in the middle"], of_its_caller)
    yield Peer(
        "rlhf.logits_to_logprobs",
        lambda logits, tokens, temperature: rlhf.logits_to_logprobs(logits, tokens, temperature),
        "logprobs", {"temperature": 0.7}, BF16,
    )  # fmt: skip
    yield Peer("rlhf.masked_mean", rlhf.masked_mean, "token mean", {}, TIMES_MASK)
    yield Peer("rlhf.whiten", rlhf.whiten, "whiten", {},
               white | {"mean 0": added, "far from 0": added})  # fmt: skip
    yield Peer("rlhf.whiten, shift_mean=False", lambda x, mask: rlhf.whiten(x, mask, False),
               "whiten", {}, white)  # fmt: skip
    yield Peer("rlhf.estimate_advantages, before it whitens", before_whitening, "gae", GAE, zeroed)
    yield Peer("rlhf.get_rewards_ppo", token_rewards, "rewards")
    yield Peer("PPOLoss, of the policy", policy, "policy", CLIP, TIMES_MASK)
    yield Peer("PPOLoss, of the values", value, "value", {"clip": 0.2}, TIMES_MASK)
    yield Peer("DPOLoss", first(DPOLoss(beta=0.1)), "dpo", {"beta": 0.1})
    yield Peer("RSOLoss", first(RSOLoss(gamma=0.1)), "preference")


def torchrl() -> Iterator[Peer]:
    """torchrl: https://github.com/pytorch/rl"""
    from torchrl.objectives.llm import CISPOLoss, GRPOLoss
    from torchrl.objectives.llm.distillation import k3_kl_token_estimate
    from torchrl.objectives.value import functional

    trainer = SimpleNamespace(_clip_bounds=(math.log(0.8), math.log(1.2)))

    def gae(estimate):
        def adapted(rewards, values, mask):
            last = torch.arange(mask.shape[-1]) == mask.sum(-1, keepdim=True) - 1
            columns = values, pad(values, (0, 1))[:, 1:], rewards, last
            advantages, returns = estimate(0.9, 0.8, *(x[..., None] for x in columns))
            return advantages[..., 0], returns[..., 0]

        return adapted

    def per_token(kind):
        def adapted(logprobs, old_logprobs, advantages, mask):
            return kind._compute_policy_objective(trainer, logprobs - old_logprobs, advantages)[0]

        return adapted

    ended = {"NaN": "precondition, not stated: the value after the end is finite (multiplied by 0)"}
    unlearned = (
        "bug: the weight is clipped in the graph and no log-prob stands beside it, so a clipped "
        "token learns nothing, which the paper's loss was made for (eq. 4); open-instruct #1269 "
        "mended the same"
    )
    for name in ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"):
        yield Peer(name, gae(getattr(functional, name)), "gae", GAE, ended, HOLES)
    yield Peer("k3_kl_token_estimate", lambda p, ref: k3_kl_token_estimate(ref, p),
               "non-negative kl", {}, BF16)  # fmt: skip
    yield Peer("GRPOLoss, per token", per_token(GRPOLoss), "policy", CLIP, {}, NAN)
    yield Peer("CISPOLoss, per token", per_token(CISPOLoss), "cispo", {},
               {"keeps a gradient": unlearned}, NAN)  # fmt: skip


def verl() -> Iterator[Peer]:
    """verl: https://github.com/verl-project/verl"""
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional

    yield from _verl_numerics(torch_functional, core_algos)
    yield from _verl_losses(core_algos)
    yield from _verl_advantages(core_algos)


def _verl_numerics(functional: Any, core: Any) -> Iterator[Peer]:
    def chunked(logits):
        rows = functional.entropy_from_logits_with_chunking(logits.flatten(0, 1))
        return rows.view(logits.shape[:-1])

    def penalty(name):
        return lambda logprobs, ref_logprobs: core.kl_penalty(logprobs, ref_logprobs, name)

    white = NOT_ZEROED | {"One kept": "definition: it raises, and says to take a larger batch"}
    clamped = {
        "mean over": "definition: values above 10 are clamped, so the mean is too low",
        "never negative": "rounding: exp(x) - x - 1 cancels (tunix #2315); harmless in size",
    }
    forward = (
        "definition: k3's is the gradient of KL(pi_ref || pi); its comments say that it is not the "
        "KL's, and `low_var_kl+` has that"
    )
    half = (
        "precondition, not stated: float32; it is off by more than the rounding of its result, "
        "where the chunked one converts"
    )
    for name in ("logprobs_from_logits_naive", "logprobs_from_logits_v2"):
        yield Peer(name, getattr(functional, name), "logprobs", {}, BF16)
    yield Peer("entropy_from_logits", functional.entropy_from_logits, "entropy", {},
               BANNED | {"bf16": half})  # fmt: skip
    yield Peer("entropy_from_logits_with_chunking", chunked, "entropy", {}, BANNED)
    yield Peer("masked_mean", functional.masked_mean, "token mean")
    yield Peer("masked_whiten", functional.masked_whiten, "whiten", {}, white)
    yield Peer("kl_penalty, k1", penalty("k1"), "kl")
    yield Peer("kl_penalty, low_var_kl", penalty("low_var_kl"), "non-negative kl", {},
               BF16 | clamped)  # fmt: skip
    yield Peer("kl_penalty, low_var_kl, as a loss", penalty("low_var_kl"), "kl loss", {},
               BF16 | {"mean of its gradient": forward})  # fmt: skip
    yield Peer("kl_penalty, low_var_kl+, as a loss", penalty("low_var_kl+"), "kl loss", {}, BF16)


def _verl_losses(core: Any) -> Iterator[Peer]:
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2, clip_ratio_high=0.2,
    )  # fmt: skip
    losses = NO_TOKEN | {
        "NaN": "precondition, not stated: padding holds finite numbers; verl #2377 mended the "
        "value of masked_sum, not what is upstream of it"
    }

    def policy(loss):
        def adapted(logprobs, old_logprobs, advantages, mask):
            return loss(old_logprobs, logprobs, advantages, mask.float(), config=config)[0]

        return adapted

    def value(values, old_values, returns, mask):
        return core.compute_value_loss(values, returns, old_values, mask.float(), 0.2)[0]

    def aggregated(mode):
        return lambda per_token, mask: core.agg_loss(per_token, mask.float(), mode)

    def parts(batches):
        tokens = sum(mask.sum() for _, mask in batches)
        return sum(core.agg_loss(x, m.float(), "token-mean", 1, tokens) for x, m in batches)

    for name, like, settings, judged in (
        ("vanilla", "policy", CLIP, NO_TOKEN),
        ("gspo", "policy", CLIP, losses),
        ("cispo", "cispo", {}, losses),
    ):
        loss = getattr(core, f"compute_policy_loss_{name}")
        yield Peer(loss.__name__, policy(loss), like, settings, judged)
    yield Peer("compute_value_loss", value, "value", {"clip": 0.2}, losses)
    for mode, like, judged in (
        ("token-mean", "token mean", NO_TOKEN),
        ("seq-mean-token-mean", "sequence mean", losses),
        ("seq-mean-token-sum", "sequence sum", losses),
    ):
        yield Peer(f"agg_loss, {mode}", aggregated(mode), like, {}, judged)
    yield Peer("agg_loss, token-mean of the batch's tokens", parts, "accumulation")


def _verl_advantages(core: Any) -> Iterator[Peer]:
    def before_whitening(rewards, values, mask):
        wide = [pad(x, (0, 0, 0, 1)) for x in (rewards, values)]  # whitening refuses one token
        kept = pad(mask.float(), (0, 0, 0, 1), value=1.0)
        returns = core.compute_gae_advantage_return(*wide, kept, 0.9, 0.8)[1][:-1]
        return returns - values, returns

    def of_groups(estimate, **settings):
        def adapted(rewards):
            index = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1]).numpy()
            scores = rewards.reshape(-1, 1)
            out = estimate(scores, torch.ones_like(scores), index, **settings)[0]
            return out.view(rewards.shape)

        return adapted

    small = (
        "rounding, not harmless: eps = 1e-6 is no larger than the rounding of the mean can be, so "
        "three answers that all got -0.9 are all pushed down"
    )
    yield Peer("compute_gae_advantage_return, before it whitens", before_whitening, "gae", GAE,
               TIMES_MASK)  # fmt: skip
    for name in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized"):
        estimate = getattr(core, f"compute_{name}_outcome_advantage")
        yield Peer(estimate.__name__, of_groups(estimate), "group advantages", {},
                   ONE_ANSWER | {"Equal rewards": small})  # fmt: skip
    yield Peer(
        "compute_grpo_outcome_advantage, without std",
        of_groups(core.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        "group advantages",
        judged=ONE_ANSWER | {"Equal rewards": "rounding: harmless in size"},
    )


def openrlhf() -> Iterator[Peer]:
    """OpenRLHF: https://github.com/OpenRLHF/OpenRLHF"""
    importlib.import_module("openrlhf.models.loss")
    yield from ()  # where it imports, its functions can be adapted here


def first(f: Callable[..., Any]) -> Callable[..., Any]:
    """The first of what it returns."""
    return lambda *args: f(*args)[0]


LIBRARIES = trl, torchtune, torchrl, verl, openrlhf
