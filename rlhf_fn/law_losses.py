"""Laws of losses of tokens: the policy's, the value function's, and how they are reduced."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fn.strategies import micro_batches, policies, trajectories
from rlhf_fn.trials import Broken, Subject, agree, finite, law, show

POISON = 3.0  # nothing special: a number that a function which reads it cannot help showing


def _loss(f: Subject, *args: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, summed over kept tokens where it is one per token, and its gradient."""
    return f.slope(*args, mask=args[-1])


def _same(what: str, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    agree(f"{what}: the loss", got[0], expected[0])
    agree(f"{what}: the gradient", got[1], expected[1])


@law(
    known_from="rllm #508, AReaL #1346, DeepSpeedExamples #819, TRL #1625 (padding in a loss)",
    given=policies(),
)
def never_read(f, **case):
    """What the mask hides is never read."""
    *xs, mask = case.values()
    dirty = [torch.where(mask, x, POISON) for x in xs]
    _same(f"with {POISON:g} under the mask", _loss(f, *dirty, mask), _loss(f, *xs, mask))


@law(
    known_from="verl #2377 ((x * mask).sum() of NaN is NaN)",
    given=policies(),
)
def nan_stays(f, **case):
    """NaN under the mask reaches neither the loss nor its gradient."""
    *xs, mask = case.values()
    dirty = [torch.where(mask, x, torch.nan) for x in xs]
    _same("with NaN under the mask", _loss(f, *dirty, mask), _loss(f, *xs, mask))


@law(
    known_from="TRL #1625, DeepSpeedExamples #819 (the mean over padding, too)",
    given=policies(),
)
def more_padding(f, **case):
    """More padding changes nothing."""
    wider = [pad(x, (0, 2)) for x in case.values()]
    loss, gradient = _loss(f, *wider)
    _same("two columns more", (loss, gradient[..., :-2]), _loss(f, *case.values()))


@law(
    known_from="rllm #508 (rows of padding in the denominator shrank the step by 40 %)",
    given=policies(),
)
def more_rows(f, **case):
    """A row that is all padding changes nothing."""
    taller = [pad(x, (0, 0, 0, 1)) for x in case.values()]
    loss, gradient = _loss(f, *taller)
    _same("a row more", (loss, gradient[:-1]), _loss(f, *case.values()))


@law(
    known_from="verl #782, open-instruct #1685, NeMo-RL #166, OpenRLHF #583 (0/0)",
    given=policies(),
)
def nothing_kept(f, **case):
    """Where nothing is kept, the loss is finite and its gradient 0."""
    *xs, mask = case.values()
    hidden = torch.zeros_like(mask)
    loss, gradient = f.slope(*xs, hidden, mask=hidden, may_be_constant=True)
    finite("the loss", loss)
    agree("the gradient", gradient, torch.zeros_like(gradient), rtol=0.0, atol=0.0)


HIDDEN = never_read, nan_stays, more_padding, more_rows, nothing_kept


@law(
    known_from="open-instruct #1269 (CISPO without the log-prob); rlhf-book #125 (a missing sign)",
    given=policies(),
)
def reinforce_at_ratio_one(f, logprobs, old_logprobs, advantages, mask):
    """At ratio one its gradient is REINFORCE's."""

    def slope(advantages: Tensor) -> Tensor:
        return _loss(f, old_logprobs, old_logprobs.clone(), advantages, mask)[1]

    down = slope(torch.ones_like(advantages))
    if not (down[mask] < 0).all():
        raise Broken(f"of advantages 1 the gradient is {show(down)}, expected < 0 where kept")
    agree("the gradient", slope(advantages), advantages * down)


def _unclipped(log_ratio: Tensor, advantages: Tensor, settings: Any) -> Tensor:
    ratio = log_ratio.exp()
    too_high = (advantages > 0) & (ratio > 1 + settings["clip_high"])
    too_low = (advantages < 0) & (ratio < 1 - settings["clip_low"])
    return ~(too_high | too_low)


_moves = st.sampled_from([0.0, 0.03125, -0.03125, 1.0, -1.0, 0.5, -0.5])


@law(
    known_from="torchrl #786, Practical_RL #248 (max where min was meant)",
    given=policies(moves=_moves),
    needs=("clip_low", "clip_high"),
)
def clip_takes_the_gradient(f, logprobs, old_logprobs, advantages, mask, moves):
    """A token has a gradient just where the clip leaves it one.

    The ratio is one number for all tokens, so it is also that of the whole answer.
    """
    args = old_logprobs, advantages, mask
    slope = _loss(f, old_logprobs + moves, *args)[1]
    moved = old_logprobs + moves - old_logprobs
    expected = _unclipped(moved, advantages, f.settings) & (advantages != 0) & mask
    if not torch.equal(slope != 0, expected):
        ratio = moved.exp().flatten()[0].item()
        raise Broken(
            f"at ratio {ratio:.4g} the gradient is {show(slope)}, expected one at {show(expected)}"
        )


@law(
    known_from="open-instruct #1269 (CISPO as a clipped ratio, without the log-prob)",
    given=policies(moves=st.sampled_from([0.5, -0.5, 2.0, -2.0])),
)
def clip_keeps_the_gradient(f, logprobs, old_logprobs, advantages, mask, moves):
    """A clipped token keeps a gradient."""
    slope = _loss(f, old_logprobs + moves, old_logprobs, advantages, mask)[1]
    expected = -advantages.sign() * mask
    if not torch.equal(slope.sign(), expected):
        raise Broken(f"{moves:+g}: the gradient is {show(slope)}, its signs {show(expected)}")


VALUE = trajectories("values", "old_values", "returns")


@law(
    known_from="verl #2506 (one argument given for another)",
    given=VALUE,
)
def towards_the_return(f, values, old_values, returns, mask):
    """A value too high has a gradient > 0, one too low < 0."""
    slope = _loss(f, values, values.clone(), returns, mask)[1]
    expected = (values - returns).sign() * mask
    if not torch.equal(slope.sign(), expected):
        raise Broken(f"the gradient is {show(slope)}, expected signs {show(expected)}")


@law(
    known_from="verl #2016 (without the half)",
    given=trajectories(
        "values", "old_values", "returns", mask=lambda *s: st.just(torch.ones(*s) > 0)
    ),
    needs=("clip",),
)
def half_squared_error(f, values, old_values, returns, mask):
    """It is half the larger of the squared errors, clipped and not.

    Of one token, so that every mean is that token.
    """
    args = [x[:1, :1] for x in (values, old_values, returns)]
    value, old, target = args
    clipped = value.clamp(old - f.settings["clip"], old + f.settings["clip"])
    expected = torch.maximum((value - target).square(), (clipped - target).square()).sum() / 2
    agree("the loss of the first token", _loss(f, *args, mask[:1, :1])[0], expected)


REDUCTION = trajectories("x")


_confused = "TRL #2881, verl #931, #1340, OpenRLHF 1b23ecf0 (one mean for another)"


def _is_sum(f: Subject, x: Tensor, mask: Tensor, weights: Tensor) -> None:
    agree("the loss", f(x, mask), (torch.where(mask, x, 0.0) * weights).sum())


@law(known_from=f"{_confused}; rllm #508", given=REDUCTION)
def is_token_mean(f, x, mask):
    """It is the mean over all kept tokens."""
    _is_sum(f, x, mask, mask / mask.sum())


@law(known_from=_confused, given=REDUCTION)
def is_sequence_mean(f, x, mask):
    """It is the mean over rows of the mean over their kept tokens."""
    _is_sum(f, x, mask, mask / mask.sum(-1, keepdim=True) / mask.shape[0])


@law(known_from=_confused, given=REDUCTION)
def is_sequence_sum(f, x, mask):
    """It is the mean over rows of the sum over their kept tokens."""
    _is_sum(f, x, mask, mask / mask.shape[0])


PARTS = micro_batches()


@law(
    known_from="transformers #24725, #34191, verl #3332, NeMo-RL #86, TRL #2615 ... #3716, mlx-lm "
    "#1413 (a mean of means); ms-swift #10116, unsloth #8261 (divided twice); verl #141",
    given=PARTS,
)
def split_changes_nothing(f, x, mask, cut):
    """How the batch is split into micro-batches changes nothing."""
    whole = f([(x, mask)])
    parts = f([(x[:cut], mask[:cut]), (x[cut:], mask[cut:])])
    agree("in two parts, the loss", parts, whole)


@law(
    known_from="TRL #6478 (a token count of 0); verl #782 (0/0)",
    given=PARTS,
)
def empty_part(f, x, mask, cut):
    """A micro-batch in which nothing is kept changes nothing."""
    empty = torch.zeros_like(x), torch.zeros_like(mask)
    agree("with an empty part, the loss", f([(x, mask), empty]), f([(x, mask)]))
