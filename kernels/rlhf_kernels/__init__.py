"""Triton kernels that compose: the functions of `rlhf_fn`'s floor 0, under their own names.

They run under backward, every transform of `torch.func` and `torch.compile(fullgraph=True)`, on a
GPU by Triton and on a CPU by a path of its own.
"""

from rlhf_kernels.divergence import Divergence, full_kl, token_logprobs_and_kl
from rlhf_kernels.linear import (
    Hits,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_logprobs_and_hits,
)
from rlhf_kernels.linear_divergence import linear_full_kl
from rlhf_kernels.logprobs import (
    Statistics,
    entropy,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhf_kernels.returns import Gae, Vtrace, discounted_returns, gae, vtrace
from rlhf_kernels.sampling import Sample, greedy, sample
from rlhf_kernels.scans import suffix_scan
from rlhf_kernels.shards import vocab_parallel_token_logprobs_and_entropy

__all__ = [
    "Divergence",
    "Gae",
    "Hits",
    "Sample",
    "Statistics",
    "Vtrace",
    "discounted_returns",
    "entropy",
    "full_kl",
    "gae",
    "greedy",
    "linear_full_kl",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "linear_token_logprobs_and_hits",
    "sample",
    "suffix_scan",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_logprobs_and_kl",
    "vocab_parallel_token_logprobs_and_entropy",
    "vtrace",
]
