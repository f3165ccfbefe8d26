"""Bugs of other projects as small functions: in rewards, advantages, groups and preferences."""

import torch
from cases_laws import breaks
from torch.nn.functional import logsigmoid

import rlhf_fn as fn

GAE = {"discount": 0.9, "lam": 0.8}


# rewards, returns, whitening


@breaks("rewards", "is paid the score")
def after_the_end(score, logprobs, ref_logprobs, mask):
    after = mask.sum(-1, keepdim=True).clamp(max=mask.shape[-1] - 1)
    return (ref_logprobs - logprobs).scatter_add(-1, after, score[:, None])


@breaks("rewards", "is paid the score")
def nought_for_none(score, logprobs, ref_logprobs, mask):
    score = torch.stack([s if s else torch.tensor(-1.0) for s in score])
    return fn.shape_rewards(score, logprobs, ref_logprobs, mask, beta=0.1)


@breaks("rewards", "to drift from the reference")
def paid_to_drift(score, logprobs, ref_logprobs, mask):
    return fn.shape_rewards(score, ref_logprobs, logprobs, mask, beta=0.1)


def loop(rewards, values, mask, discount, lam):
    """GAE that heeds no mask."""
    out, advantage, after = [], 0.0, 0.0
    for t in reversed(range(rewards.shape[-1])):
        advantage = rewards[:, t] + discount * after - values[:, t] + discount * lam * advantage
        after = values[:, t]
        out.append(advantage)
    return torch.stack(out[::-1], -1)


breaks("gae", "never read", **GAE)(loop)
breaks("gae", "the recursion of GAE", **GAE)(loop)


@breaks("gae", "NaN under the mask", **GAE)
def nan_loop(rewards, values, mask, discount, lam):
    return loop(rewards * mask, values * mask, mask, discount, lam)


@breaks("gae", "more padding", **GAE)
def bootstrap_at_the_end(rewards, values, mask, discount, lam):
    size = rewards.shape[-1]
    return loop(rewards, values, mask, discount, lam) + values.mean() / size


@breaks("gae", "as if cut out", **GAE)
def decayed_by_tools(rewards, values, mask, discount, lam):
    kept = [torch.where(mask, x, 0.0) for x in (rewards, values)]
    return loop(*kept, mask, discount, lam)


@breaks("gae", "advantages plus values", **GAE)
def other_returns(rewards, values, mask, discount, lam):
    advantages = fn.gae(rewards, values, mask, discount=discount, lam=lam).advantages
    return advantages, fn.discounted_returns(rewards, mask, discount=discount)


def whiten(x, mask, correction=0, eps=1e-8):
    kept = x[mask]
    white = (x - kept.mean()) / (kept.var(correction=correction) + eps).sqrt()
    return torch.where(mask, white, 0.0)


@breaks("whiten", "never read")
def white_over_padding(x, mask):
    return torch.where(mask, (x - x.mean()) / (x.var() + 1e-8).sqrt(), 0.0)


@breaks("whiten", "mean 0 and variance 1")
def mean_put_back(x, mask):
    return whiten(x, mask) + x[mask].mean()


@breaks("whiten", "hidden values come out as 0")
def padding_not_nought(x, mask):
    return (x - x[mask].mean()) / x[mask].std()


@breaks("whiten", "one kept value")
def bessel_of_one(x, mask):
    return whiten(x, mask, correction=1)


@breaks("whiten", "a mean far from 0")
def cancelling_variance(x, mask):
    kept = x[mask]
    variance = kept.square().mean() - kept.mean().square()
    return torch.where(mask, (x - kept.mean()) / (variance + 1e-8).sqrt(), 0.0)


# groups


@breaks("group advantages", "equal rewards")
def eps_below_rounding(rewards):
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-9)


@breaks("group advantages", "a constant added")
def raw_reward(rewards):
    return rewards / (rewards.std(-1, keepdim=True) + 1e-4)


@breaks("group advantages", "one prompt is nobody")
def groups_by_position(rewards):
    answers = rewards.T.reshape(rewards.shape)  # prompt after prompt, read as sample after sample
    return fn.dr_grpo_advantages(answers)


@breaks("group advantages", "rounding is not amplified")
def leave_one_out_std(rewards):
    others = [[x for j, x in enumerate(row) if j != i] for row in rewards for i in range(len(row))]
    out = []
    for reward, rest in zip(rewards.flatten(), map(torch.stack, others)):
        variance = (rest.square().mean() - rest.mean().square()).clamp(min=0)
        scale = variance.sqrt() + 1e-6
        out.append((reward - rest.mean()) / scale)
    return torch.stack(out).view(rewards.shape)


@breaks("group advantages", "without company")
def nan_of_one(rewards):
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)


@breaks("group advantages", "without company")
def raw_of_one(rewards):
    return rewards if rewards.shape[-1] == 1 else fn.dr_grpo_advantages(rewards)


@breaks("group advantages", "a reward of NaN")
def scaled_by_the_batch(rewards):
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std() + 1e-4)


# preferences


def minus_log_sigmoid(x):
    return -torch.log(torch.sigmoid(x))


@breaks("preference", "have in common cancels")
def reference_of_another(chosen, rejected, ref_chosen, ref_rejected):
    return -logsigmoid(chosen - rejected - (ref_chosen - ref_rejected).detach() * 0.5)


@breaks("preference", "pushes the chosen")
def of_one_answer(chosen, rejected, ref_chosen, ref_rejected):
    return -chosen + 0 * rejected


@breaks("preference", "extreme log-probs")
def underflowing(chosen, rejected, ref_chosen, ref_rejected):
    return minus_log_sigmoid(chosen - rejected - (ref_chosen - ref_rejected))


@breaks("dpo", "log 2 where the policy", beta=0.1)
def without_reference(chosen, rejected, ref_chosen, ref_rejected):
    return -logsigmoid(0.1 * (chosen - rejected))


@breaks("dpo", "-log sigmoid of beta", beta=0.1)
def another_loss(chosen, rejected, ref_chosen, ref_rejected):
    return fn.ipo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)


@breaks("reward loss", "log 2 where both")
@breaks("reward loss", "adds the difference of the scores")
def sigmoid_without_log(chosen, rejected):
    return -torch.sigmoid(chosen - rejected)


@breaks("reward loss", "scores far apart")
def infinite(chosen, rejected):
    return minus_log_sigmoid(chosen - rejected)


@breaks("reward loss", "scores far apart")
def exponential(chosen, rejected):
    return torch.log(1 + torch.exp(rejected - chosen))


@breaks("odds ratio", "nearly certain")
def log_of_nought(chosen, rejected):
    odds = [x - torch.log(1 - torch.exp(x)) for x in (chosen, rejected)]
    return -logsigmoid(odds[0] - odds[1])
