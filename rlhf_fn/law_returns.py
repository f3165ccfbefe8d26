"""Laws of rewards of tokens, of advantages along time, of whitening, and of groups of answers."""

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fn.law_losses import POISON
from rlhf_fn.strategies import (
    REWARDS,
    groups,
    named,
    ragged,
    scored,
    spread,
    tensor,
    trajectories,
)
from rlhf_fn.trials import Broken, Subject, agree, finite, law, show

TRAJECTORIES = trajectories("rewards", "values")
SCORED = scored()
WHITEN = spread()
GROUPS = groups()


def _kept(f: Subject, *args: Tensor) -> Tensor:
    """What f says of the kept tokens; the mask is the last argument."""
    out, mask = f(*args), args[-1]
    if out.shape != mask.shape:
        raise Broken(f"the result has shape {tuple(out.shape)}, expected {tuple(mask.shape)}")
    return out[mask]


def _hidden(case: dict[str, Any], fill: float) -> list[Tensor]:
    """The arguments with `fill` under the mask."""
    *xs, mask = case.values()
    return [*(torch.where(mask, x, fill) if x.shape == mask.shape else x for x in xs), mask]


@law(
    known_from="verl #50, #1850, ROLL #447 (GAE read the values of padding); ray #63900",
    given=TRAJECTORIES,
)
def never_read(f, **case):
    """What the mask hides is never read."""
    dirty = _kept(f, *_hidden(case, POISON))
    agree(f"with {POISON:g} under the mask, the kept part", dirty, _kept(f, *case.values()))


@law(known_from="verl #2377 (x * mask of NaN is NaN)", given=TRAJECTORIES)
def nan_stays(f, **case):
    """NaN under the mask reaches nothing that is kept."""
    dirty = _kept(f, *_hidden(case, torch.nan))
    agree("with NaN under the mask, the kept part", dirty, _kept(f, *case.values()))


@law(
    known_from="verl #50, #1850, ROLL #447 (a bootstrap from padding); ray #63900",
    given=TRAJECTORIES,
)
def more_padding(f, **case):
    """More padding changes nothing."""
    shape = case["mask"].shape
    wider = [pad(x, (0, 2)) if x.shape == shape else x for x in case.values()]
    agree("two columns more: the kept part", _kept(f, *wider), _kept(f, *case.values()))


HIDDEN = never_read, nan_stays, more_padding


def _loop(rewards: Tensor, values: Tensor, discount: float, lam: float) -> list[float]:
    advantage, after, out = 0.0, 0.0, []
    for r, v in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        advantage = r + discount * after - v + discount * lam * advantage
        after = v
        out.append(advantage)
    return out[::-1]


def _compressed(f: Subject, rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """GAE of every row with its hidden tokens cut out, one after the other."""
    settings = f.settings["discount"], f.settings["lam"]
    rows = (_loop(r[m], v[m], *settings) for r, v, m in zip(rewards, values, mask))
    return torch.tensor(list(itertools.chain.from_iterable(rows)))


@law(
    known_from="torchrl #2773, #4209, Mava #951 (a bootstrap across the end)",
    given=TRAJECTORIES,
    needs=("discount", "lam"),
)
def is_gae(f, rewards, values, mask):
    """It is the recursion of GAE, up to the last kept token."""
    agree("of kept tokens", f(rewards, values, mask)[mask], _compressed(f, rewards, values, mask))


@law(
    known_from="verl #2337, miles #1827 (what a tool said decayed the credit)",
    given=trajectories("rewards", "values", mask=ragged),
    needs=("discount", "lam"),
)
def cut_out(f, rewards, values, mask):
    """Hidden tokens in the middle are as if cut out."""
    agree("of kept tokens", f(rewards, values, mask)[mask], _compressed(f, rewards, values, mask))


@law(
    known_from="HALOs (its critic learns other returns than its advantages are made of)",
    given=TRAJECTORIES,
)
def returns_are_sums(f, rewards, values, mask):
    """Returns are advantages plus values."""
    advantages, *returns = f.results(rewards, values, mask)
    if returns:
        agree("of kept tokens, the returns", returns[0][mask], (advantages + values)[mask])


@law(
    known_from="TRL #1893, #3750, #5338 (paid one token after the end); OpenRLHF #1219 (a score of "
    "0 was none)",
    given=SCORED,
)
def pays_the_score(f, score, logprobs, ref_logprobs, mask):
    """Where the policy is its reference, the last kept token is paid the score, and no other."""
    last = mask.sum(-1, keepdim=True) - 1
    expected = torch.zeros_like(logprobs).scatter(-1, last, score[:, None])
    agree("of kept tokens", f(score, logprobs, logprobs.clone(), mask)[mask], expected[mask])


@law(
    known_from="verl #179 (the KL term with the wrong sign)",
    given=SCORED,
)
def drift_costs(f, score, logprobs, ref_logprobs, mask):
    """To drift from the reference never pays."""
    drifted = f(score, ref_logprobs + 0.5, ref_logprobs, mask)
    total = torch.where(mask, drifted, 0.0).sum(-1)
    if not (total < score).all():
        raise Broken(
            f"0.5 nats up at every token, rows are paid {show(total)}, not below the score"
        )


@law(
    known_from="torchtune's whiten (puts the mean back where it is asked to take it away)",
    given=WHITEN,
)
def is_white(f, x, mask):
    """Kept values come out with mean 0 and variance 1."""
    white = f(x, mask)[mask].double()
    number, variance = len(white), white.var(correction=0).item()
    if not white.mean().abs() < 1e-3:
        raise Broken(f"the mean is {white.mean():.4g}")
    if not min(abs(variance - 1), abs(variance - (number - 1) / number)) < 0.02:
        raise Broken(f"the variance is {variance:.4g}, of {number} values")


@law(
    known_from="verl #1527 (padding was not 0 after whitening)",
    given=WHITEN,
)
def hidden_are_zero(f, x, mask):
    """Hidden values come out as 0."""
    white = f(x, mask)
    agree("under the mask", white[~mask], torch.zeros_like(white[~mask]), rtol=0.0, atol=0.0)


@law(
    known_from="ROLL #475, #476 (Bessel's correction of one value)",
    given=named(x=tensor(1, 3), mask=st.just(torch.tensor([[True, False, False]]))),
)
def one_value(f, x, mask):
    """One kept value gives a finite number."""
    if f.refused(x, mask):
        raise Broken("one value is refused")
    finite("the kept value", f(x, mask)[mask])


@law(
    known_from="slime's distributed_masked_whiten (E[x^2] - E[x]^2 in float32)",
    given=WHITEN,
)
def far_from_zero(f, x, mask):
    """A mean far from 0 costs no precision."""
    agree("1000 higher, the kept part", f(x + 1000, mask)[mask], f(x, mask)[mask], atol=2e-2)


@law(
    known_from="NeMo-RL #1519 (a std of 0, but for rounding); so does eps = 1e-9 in OpenRLHF",
    given=groups(among=[0.0], level=st.sampled_from([0.1, 1.0, 0.3, 0.7, -0.9])),
)
def equal_rewards(f, rewards, level):
    """Equal rewards give advantage exactly 0."""
    same = torch.full_like(rewards, level)
    nought = torch.zeros_like(same)
    agree(f"of rewards {level:g}, the advantage", f(same), nought, rtol=0.0, atol=0.0)


@law(
    known_from="verl #3635 (the raw reward for an advantage)",
    given=groups(shift=st.sampled_from([1.0, -1.0, 4.0, 64.0])),
)
def shifted_rewards(f, rewards, shift):
    """A constant added to all rewards of a group changes nothing."""
    agree(f"{shift:+g}: the advantage", f(rewards + shift), f(rewards), atol=1e-3)


@law(
    known_from="AReaL #1419, slime #1918, NeMo-RL #2176 (answers of two prompts in one group)",
    given=GROUPS,
)
def prompts_apart(f, rewards):
    """One prompt is nobody else's business."""
    alone = torch.cat([f(row[None]) for row in rewards])
    agree("of all prompts at once, the advantage", f(rewards), alone, atol=1e-4)


@law(
    known_from="NeMo-RL #1519 (divided by a std that is 0 but for rounding)",
    given=named(
        group=st.integers(3, 5), level=st.sampled_from([0.9, 0.1, 0.3]), odd=st.sampled_from([1, 8])
    ),
)
def bounded(f, group, level, odd):
    """Rounding is not amplified: no advantage exceeds sqrt(n), nor n/(n - 1) times the range."""
    rewards = torch.full((1, group), level)
    rewards[0, 0] += odd
    advantages = f(rewards)
    most = max(group**0.5, odd * group / (group - 1)) * 1.001
    if not (advantages.abs() <= most).all():
        raise Broken(f"of rewards {show(rewards)} the advantages are {show(advantages)}")


@law(
    known_from="DeepAnalyze #116 (NaN); verl #3635 (its raw reward)",
    given=named(rewards=tensor(2, 1, among=REWARDS)),
)
def alone(f, rewards):
    """An answer without company is compared with nothing: advantage 0, or refused."""
    if not f.refused(rewards):
        agree("the advantage", f(rewards), torch.zeros_like(rewards))


@law(
    known_from="ms-swift #8123, TRL #5773, #5775 (one NaN, and all learn nothing)",
    given=named(rewards=tensor(2, 3, among=REWARDS)),
)
def nan_reward(f, rewards):
    """A reward of NaN reaches no other prompt, or is refused."""
    broken = rewards.clone()
    broken[1, 0] = torch.nan
    if not f.refused(broken):
        agree("the other prompt's advantage", f(broken)[:1], f(rewards)[:1], atol=1e-4)
