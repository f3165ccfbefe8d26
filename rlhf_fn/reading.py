"""How a run reads its policy: by logits, or by kernels that it is given and that need none."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fn import logprobs as lp
from rlhf_fn.config import ConfigError
from rlhf_fn.imported import imported
from rlhf_fn.losses import Apply, next_token_logprobs
from rlhf_fn.models import Functional, Params, causal_lm
from rlhf_fn.precision import cast
from rlhf_fn.prefix import with_prefix
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.recompute import checkpointed
from rlhf_fn.sharding import assembled, in_slices
from rlhf_fn.updates import precision


class Reading(NamedTuple):
    """A module as a function, and log-probs of what that returns, as losses ask for them.

    `hits` may return (log π, whether the token is the likeliest) and `entropies` (log π, H); what
    they leave out, the losses find in the logits.
    """

    make: Callable[[PreTrainedModel], Functional]
    logprobs: Callable[..., Any]
    hits: Callable[..., Any]
    entropies: Callable[..., Any]

    def answers(self, apply: Apply, method: Any, last: int) -> Callable[..., Any]:
        """log π of so many tokens that may have been sampled, aligned with the rows; else 0.

        A prompt is read once for all of its answers, but not of slices: see `sharding.shared_for`.
        """
        logprobs = next_token_logprobs(
            apply, temperature=method.temperature, last=last, token_logprobs=self.logprobs
        )

        def of(params: Params, tokens: Tensor, attention: Tensor) -> Tensor:
            rows = tokens, attention
            return logprobs(params, *(rows if in_slices(params) else with_prefix(*rows, last)))

        return of


FUNCTIONS = (
    "linear_token_logprobs",
    "linear_token_logprobs_and_hits",
    "linear_token_logprobs_and_entropy",
)
LOGITS = Reading(causal_lm, lp.token_logprobs, lp.token_logprobs, lp.token_logprobs)


def reading(options: Any) -> Reading:
    """By logits, or by the functions of the module that `options.kernels` names, without any.

    Which is about memory and speed, not about numbers.

    Raises:
        ConfigError: no such module, or not with these functions; later, from `make`, logits that
            are more than a linear layer's.
    """
    if not options.kernels:
        return LOGITS._replace(make=made_by(causal_lm, options))
    try:
        functions = [imported(f"{options.kernels}:{name}") for name in FUNCTIONS]
    except ValueError as error:
        raise ConfigError(
            f"--kernels {error}; rlhf_kernels comes with pip install 'rlhf_fn[kernels]'"
        ) from error
    return Reading(made_by(_without_logits, options), *map(of_projection, functions))


def made_by(make: Callable[..., Functional], options: Any) -> Callable[..., Functional]:
    """`make(module)`, which keeps its activations or, as the options say, computes them again.

    Then a layer's parameters are cast where it computes, and gathered if they are in slices. Else
    slices are gathered all at once, and `updates.computing` casts.

    Raises:
        ConfigError: later, from what is returned, a module that cannot.
    """

    def prepare(params: Params) -> Params:
        return cast(assembled(params), precision(options))

    def again(module: PreTrainedModel) -> Functional:
        try:
            return checkpointed(make, module, prepare=prepare)
        except TypeError as error:
            raise ConfigError(f"--recompute: {error}; leave it out") from error

    def at_once(module: PreTrainedModel) -> Functional:
        apply, params = make(module)
        return Functional(lambda params, *inputs: apply(assembled(params), *inputs), params)

    if options.recompute:
        return again
    return at_once if options.shards > 1 else make


def _without_logits(module: PreTrainedModel) -> Functional:
    try:
        return projected_lm(module)
    except TypeError as error:
        raise ConfigError(f"--kernels: {error}; leave it out") from error
