"""Bugs of other projects as small functions: in log-probs and in losses of tokens."""

import torch
from cases_laws import breaks

import rlhf_fn as fn

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def token_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


# log-probs and entropy


@breaks("logprobs", "writes to none", temperature=0.5)
def divided_in_place(logits, tokens, temperature):
    return fn.token_logprobs(logits.div_(temperature), tokens)


@breaks("logprobs", "log softmax at the token", temperature=0.5)
def without_temperature(logits, tokens):
    return fn.token_logprobs(logits, tokens)


@breaks("logprobs", "log softmax at the token")
def off_by_one(logits, tokens):
    return fn.token_logprobs(logits.roll(1, 1), tokens)


class FirstUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, tokens):
        ctx.save_for_backward(logits.softmax(-1), tokens)
        return fn.token_logprobs(logits, tokens)

    @staticmethod
    def backward(ctx, *upstream):
        probs, tokens = ctx.saved_tensors
        one_hot = torch.nn.functional.one_hot(tokens, probs.shape[-1])
        return (one_hot - probs) * upstream[0].flatten()[0], None


breaks("logprobs", "own upstream gradient")(FirstUpstream.apply)


@breaks("logprobs", "a shift of the logits")
def overflowing(logits, tokens):
    return fn.token_logprobs((logits.exp() / logits.exp().sum(-1, keepdim=True)).log(), tokens)


@breaks("logprobs", "logits of -inf")
def one_hot_product(logits, tokens):
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[-1])
    return (logits.log_softmax(-1) * one_hot).sum(-1)


@breaks("logprobs", "of bf16 logits")
def in_half_precision(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


@breaks("entropy", "minus the sum", temperature=0.5)
def entropy_without_temperature(logits):
    return fn.entropy(logits)


@breaks("entropy", "a shift of the logits")
def overflowing_entropy(logits):
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -(probs * probs.log()).sum(-1)


@breaks("entropy", "logits of -inf")
def nan_entropy(logits):
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@breaks("entropy", "logits of -inf")
def nan_in_the_gradient_alone(logits):
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).nan_to_num().sum(-1)


@breaks("entropy", "of bf16 logits")
def half_entropy(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


# KL


@breaks("kl", "distance exactly 0")
def against_another_reference(logprobs, ref_logprobs):
    return logprobs - ref_logprobs.mean()


@breaks("kl", "its mean over the tokens")
def a_length_for_a_kl(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).abs()


@breaks("non-negative kl", "never negative")
def cancelling(logprobs, ref_logprobs):
    x = ref_logprobs - logprobs
    return x.exp() - x - 1


breaks("kl loss", "the mean of its gradient")(fn.k1)
breaks("kl loss", "the mean of its gradient")(fn.k3)


@breaks("kl loss", "the mean of its gradient")
def clamped(logprobs, ref_logprobs):
    return fn.k2(logprobs, ref_logprobs).clamp(max=0.1)


@breaks("kl", "of bf16 log-probs")
def half_kl(logprobs, ref_logprobs):
    x = ref_logprobs - logprobs
    return x.exp() - x - 1


# policies


def surrogate(logprobs, old_logprobs, advantages):
    return fn.clipped_surrogate(logprobs, old_logprobs, advantages, **CLIP)


@breaks("policy", "never read")
def mean_over_padding(logprobs, old_logprobs, advantages, mask):
    kept = advantages - advantages.mean(-1, keepdim=True)  # the mean advantage of a row
    return token_mean(surrogate(logprobs, old_logprobs, kept + advantages), mask)


@breaks("policy", "NaN under the mask")
def multiplied_by_the_mask(logprobs, old_logprobs, advantages, mask):
    return (surrogate(logprobs, old_logprobs, advantages) * mask).sum() / mask.sum().clamp(min=1)


@breaks("policy", "more padding")
def divided_by_the_size(logprobs, old_logprobs, advantages, mask):
    return torch.where(mask, surrogate(logprobs, old_logprobs, advantages), 0.0).mean()


@breaks("policy", "a row that is all padding")
def divided_by_the_rows(logprobs, old_logprobs, advantages, mask):
    loss = torch.where(mask, surrogate(logprobs, old_logprobs, advantages), 0.0)
    return (loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean()


@breaks("policy", "where nothing is kept")
def nought_by_nought(logprobs, old_logprobs, advantages, mask):
    return torch.where(mask, surrogate(logprobs, old_logprobs, advantages), 0.0).sum() / mask.sum()


@breaks("policy", "at ratio one")
def without_a_sign(logprobs, old_logprobs, advantages, mask):
    return -token_mean(surrogate(logprobs, old_logprobs, advantages), mask)


@breaks("policy", "at ratio one")
def without_the_logprob(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp().clamp(max=1.28).detach()
    return token_mean(-ratio * advantages, mask)


@breaks("policy", "just where the clip", **CLIP)
def max_for_min(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp()
    return token_mean(-torch.maximum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), mask)


@breaks("cispo", "a clipped token keeps")
def clipped_in_the_graph(logprobs, old_logprobs, advantages, mask):
    return token_mean(-(logprobs - old_logprobs).exp().clamp(0.8, 1.2) * advantages, mask)


# values, reductions


@breaks("value", "a value too high")
def one_for_another(values, old_values, returns, mask):
    return token_mean(fn.value_loss(values, old_values), mask)


@breaks("value", "half the larger", clip=0.2)
def without_the_half(values, old_values, returns, mask):
    return 2 * token_mean(fn.clipped_value_loss(values, old_values, returns, clip=0.2), mask)


def rows_mean(x, mask):
    return (torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def rows_sum(x, mask):
    return torch.where(mask, x, 0.0).sum(-1).mean()


breaks("token mean", "the mean over all kept tokens")(rows_mean)
breaks("sequence mean", "the mean over rows of the mean")(token_mean)
breaks("sequence sum", "the mean over rows of the sum")(token_mean)


@breaks("accumulation", "how the batch is split")
def mean_of_means(parts):
    return torch.stack([token_mean(x, mask) for x, mask in parts]).mean()


@breaks("accumulation", "how the batch is split")
def divided_twice(parts):
    tokens = sum(mask.sum() for _, mask in parts).clamp(min=1)
    return sum(torch.where(mask, x, 0.0).sum() / tokens for x, mask in parts) / len(parts)


@breaks("accumulation", "in which nothing is kept")
def empty_part(parts):
    return sum(torch.where(mask, x, 0.0).sum() / mask.sum() for x, mask in parts)
