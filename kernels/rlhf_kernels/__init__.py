"""Triton kernels that compose: the functions of `rlhf_fn`'s floor 0, under their own names.

They run under backward, every transform of `torch.func` and `torch.compile(fullgraph=True)`, on a
GPU by Triton and on a CPU by a path of its own.
"""

from rlhf_kernels.divergence import Divergence, full_kl, token_logprobs_and_kl
from rlhf_kernels.logprobs import (
    Statistics,
    entropy,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhf_kernels.sampling import Sample, greedy, sample

__all__ = [
    "Divergence",
    "Sample",
    "Statistics",
    "entropy",
    "full_kl",
    "greedy",
    "sample",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_logprobs_and_kl",
]
