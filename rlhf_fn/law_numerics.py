"""Laws of what is computed from logits: log-probs of tokens, entropy, and estimates of KL."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fn.strategies import (
    EIGHTHS,
    Strategy,
    distributions,
    logits,
    named,
    tensor,
    trajectories,
)
from rlhf_fn.trials import Broken, Subject, agree, finite, law, show

_BANNED = [*EIGHTHS, *[-torch.inf] * 8]
_nearly_certain = tensor(1, 4, among=[0.0, *(-(10 ** (-k / 4)) for k in range(8, 26))])
_LARGE = [n / 2 for n in range(33)]


def _log_softmax(logits: Tensor, subject: Subject) -> Tensor:
    """What is meant, in float64: log softmax(z/τ), τ the setting `temperature`, or 1."""
    return (logits.double() / subject.settings.get("temperature", 1.0)).log_softmax(-1)


def _logprobs(logits: Tensor, tokens: Tensor, subject: Subject) -> Tensor:
    return _log_softmax(logits, subject).gather(-1, tokens[..., None]).squeeze(-1)


def _entropy(logits: Tensor, subject: Subject) -> Tensor:
    logprobs = _log_softmax(logits, subject)
    return -(logprobs.exp() * torch.where(logprobs > -torch.inf, logprobs, 0.0)).sum(-1)


def _kept_apart(f: Subject, logits: Tensor, *rest: Tensor) -> Tensor:
    """The gradient of Σ n xₙ, n = 1, 2, ...: it tells the tokens apart."""

    def mixed(logits: Tensor, *rest: Tensor) -> Tensor:
        out = f._call(logits, *rest)[0]
        return out if not isinstance(out, Tensor) else (out * _ramp(out)).sum()

    return Subject(mixed, {}).slope(logits, *rest)[1]


def _ramp(x: Tensor) -> Tensor:
    return torch.arange(1.0, x.numel() + 1, dtype=x.dtype).reshape(x.shape)


@law(
    known_from="prime-rl #1525 (off by one between logits and labels); TRL #3029, OpenRLHF #857, "
    "verl #3133, NeMo-RL #316 (the sampling temperature forgotten)",
    given=logits(),
)
def is_log_softmax(f, logits, tokens):
    """It is log softmax at the token."""
    expected = _logprobs(logits, tokens, f)
    agree("the log-prob", f(logits, tokens), expected)


@law(
    known_from="Liger #1298 (each was scaled by that of the first)",
    given=logits(),
)
def own_upstream_gradient(f, logits, tokens):
    """Every token's gradient is scaled by its own upstream gradient."""
    x = logits.double().requires_grad_()
    exact = _logprobs(x, tokens, f)
    (expected,) = torch.autograd.grad((exact * _ramp(exact)).sum(), x)
    agree("the gradient of Σ n xₙ", _kept_apart(f, logits, tokens), expected)


_SHIFTS = st.sampled_from([1.0, -1.0, 100.0, -1e4, 1e4])


@law(
    known_from="mlx #4169 (log-softmax lost its normaliser at large logits)",
    given=st.builds(lambda case, shift: case | {"shift": shift}, logits(), _SHIFTS),
)
def shifted_logprobs(f, logits, tokens, shift):
    """A shift of the logits by a constant changes nothing."""
    expected = _logprobs(logits, tokens, f)
    agree(f"{shift:+g}: the log-prob", f(logits + shift, tokens), expected, atol=1e-2)


@law(
    known_from="TRL #7221, SkyRL #2259 (0 · -inf in the entropy); the fix of TRL #7252 left the "
    "gradient NaN",
    given=logits(among=_BANNED),
)
def banned_logprobs(f, logits, tokens):
    """Logits of -inf stay finite, forward and backward."""
    logits = logits.scatter(-1, tokens[..., None], 0.0)  # the token itself is allowed
    agree("the log-prob", f(logits, tokens), _logprobs(logits, tokens, f))
    finite("the gradient", f.slope(logits, tokens)[1])


@law(
    known_from="OpenRLHF #634, #620, NeMo-RL #26 (log-softmax in bf16)",
    given=logits(among=_LARGE),
)
def half_logprobs(f, logits, tokens):
    """Of bf16 logits it is within 0.01 of the exact one."""
    expected = _logprobs(logits, tokens, f)
    got = f(logits.bfloat16(), tokens)
    agree(f"the {got.dtype} log-prob", got, expected, rtol=0.0, atol=1e-2)


def _alone(strategy: Strategy) -> Strategy:
    """The same without tokens."""
    return strategy.map(lambda case: {name: x for name, x in case.items() if name != "tokens"})


@law(
    known_from="TRL #3029, OpenRLHF #857, verl #3133, NeMo-RL #316 (the temperature forgotten)",
    given=_alone(logits()),
)
def is_entropy(f, logits):
    """It is minus the sum of pi log pi."""
    agree("the entropy", f(logits), _entropy(logits, f))


@law(
    known_from=shifted_logprobs.known_from,
    given=_alone(shifted_logprobs.given),
)
def shifted_entropy(f, logits, shift):
    """A shift of the logits by a constant changes nothing."""
    agree(f"{shift:+g}: the entropy", f(logits + shift), _entropy(logits, f), atol=1e-2)


@law(known_from=banned_logprobs.known_from, given=_alone(banned_logprobs.given))
def banned_entropy(f, logits):
    """Logits of -inf stay finite, forward and backward."""
    logits = logits.index_fill(-1, torch.tensor([0]), 0.0)  # one token is allowed
    agree("the entropy", f(logits), _entropy(logits, f))
    finite("the gradient", f.slope(logits)[1])


@law(known_from=half_logprobs.known_from, given=_alone(half_logprobs.given))
def half_entropy(f, logits):
    """Of bf16 logits it is within 0.01 of the exact one."""
    got = f(logits.bfloat16())
    agree(f"the {got.dtype} entropy", got, _entropy(logits, f), rtol=0.0, atol=1e-2)


@law(
    known_from="TRL #495, #1340, #3194 (KL against another reference than was meant)",
    given=trajectories("logprobs"),
)
def zero_at_equality(f, logprobs, mask):
    """Equal policies are at distance exactly 0."""
    got = f(logprobs, logprobs.clone())
    agree("the KL", got, torch.zeros_like(logprobs), rtol=0.0, atol=0.0)


def _enumerated(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return logprobs, ref_logprobs, logprobs.exp().detach()


@law(
    known_from="trlx #361, #441 (the controller was fed another quantity than the KL)",
    given=distributions(),
)
def mean_is_kl(f, logits, ref_logits):
    """Its mean over the tokens of the policy is KL(pi || ref)."""
    logprobs, ref_logprobs, probs = _enumerated(logits, ref_logits)
    got = (probs * f(logprobs, ref_logprobs)).sum()
    agree("the mean", got, (probs * (logprobs - ref_logprobs)).sum(), rtol=1e-3, atol=1e-4)


@law(
    known_from="tunix #2315, unsloth-zoo #1240 (exp(x) - x - 1 cancels in float32)",
    given=named(logprobs=_nearly_certain, ref_logprobs=_nearly_certain),
)
def never_negative(f, logprobs, ref_logprobs):
    """It is never negative, however near the policies."""
    got = f(logprobs, ref_logprobs)
    if not (got >= 0).all():
        raise Broken(f"the KL is {show(got)}")


@law(
    known_from="open-instruct #534, verl #2953, OpenRLHF #1101, NeMo-RL #2506, slime #1004, TRL "
    "#2277 (k1 or k3 differentiated); NeMo-RL #2958 (a clamp dropped the gradient)",
    given=distributions(),
)
def gradient_is_that_of_kl(f, logits, ref_logits):
    """The mean of its gradient is the gradient of KL(pi || ref)."""
    ref_logprobs, probs = ref_logits.log_softmax(-1), logits.softmax(-1)

    def mean(logits: Tensor) -> Tensor:
        out = f._call(logits.log_softmax(-1), ref_logprobs)[0]
        return (probs * out).sum() if isinstance(out, Tensor) else out

    x = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((x.softmax(-1) * (x.log_softmax(-1) - ref_logprobs)).sum(), x)
    agree("the mean", Subject(mean, {}).slope(logits)[1], expected, rtol=1e-3, atol=1e-4)


@law(
    known_from="OpenRLHF #634, #620, NeMo-RL #26 (KL in bf16)",
    given=trajectories("logprobs", "ref_logprobs"),
)
def half_kl(f, logprobs, ref_logprobs, mask):
    """Of bf16 log-probs it is within 0.01 of the exact one."""
    exact = f(logprobs.double(), ref_logprobs.double())
    got = f(logprobs.bfloat16(), ref_logprobs.bfloat16())
    agree(f"the {got.dtype} KL", got, exact, rtol=0.0, atol=1e-2)
