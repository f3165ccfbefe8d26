"""The ground floor's rows of the contract's table, and what its tests draw from."""

import torch
from hypothesis import strategies as st

from rlhf_fn import distributions, random, scan

finite = st.floats(-5, 5, width=32)
seeds = st.integers(0, 2**64 - 1)


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape):
    return real(*shape).exp()


def keys(*shape):
    return torch.randint(0, 2**32, (*shape, 2))


def actions(vocab, *shape):
    return torch.randint(0, vocab, shape)


def array(*shape, elements=finite, dtype=torch.float64):
    """A strategy for tensors of one shape."""
    n = torch.Size(shape).numel()
    draws = st.lists(elements, min_size=n, max_size=n)
    return draws.map(lambda xs: torch.tensor(xs, dtype=dtype).reshape(shape))


def masks(*shape):
    """A strategy for masks of one shape; empty, full and single-token rows are drawn often."""
    time = shape[-1]
    row = st.one_of(
        st.just([False] * time),
        st.just([True] * time),
        st.integers(0, time - 1).map(lambda i: [t == i for t in range(time)]),
        st.lists(st.booleans(), min_size=time, max_size=time),
    )
    rows = torch.Size(shape[:-1]).numel()
    return st.lists(row, min_size=rows, max_size=rows).map(
        lambda rows: torch.tensor(rows).reshape(shape)
    )


# The weights are not here: they normalise over the batch, so they are not their own vmap.
# Neither is categorical_sample: its result is an integer, without dtype or gradient to keep.
CASES = {
    "suffix_scan": (scan.suffix_scan, lambda: (real(3, 7), real(3, 7))),
    "categorical_log_prob": (
        distributions.categorical_log_prob,
        lambda: (real(3, 7, 5), actions(5, 3, 7)),
    ),
    "categorical_entropy": (distributions.categorical_entropy, lambda: (real(3, 7, 5),)),
    "categorical_kl": (distributions.categorical_kl, lambda: (real(3, 7, 5), real(3, 7, 5))),
    "normal_sample": (
        distributions.normal_sample,
        lambda: (real(3, 7), positive(3, 7), keys(3)),
    ),
    "normal_log_prob": (
        distributions.normal_log_prob,
        lambda: (real(3, 7), positive(3, 7), real(3, 7)),
    ),
    "normal_entropy": (distributions.normal_entropy, lambda: (positive(3, 7),)),
    "normal_kl": (
        distributions.normal_kl,
        lambda: (real(3, 7), positive(3, 7), real(3, 7), positive(3, 7)),
    ),
}

FLOAT32_FROM_HALF = set(CASES) - {"suffix_scan", "normal_sample"}  # convention 8's exceptions

INTEGER_CASES = {  # purity, vmap and compile only
    "categorical_sample": (distributions.categorical_sample, lambda: (real(3, 7, 5), keys(3))),
    "split": (random.split, lambda: (keys(3),)),
    "bits": (lambda key: random.bits(key, (4, 3)), lambda: (keys(3),)),
    "uniform": (lambda key: random.uniform(key, (5,)), lambda: (keys(3),)),
    "gumbel": (lambda key: random.gumbel(key, (5,)), lambda: (keys(3),)),
    "normal": (lambda key: random.normal(key, (5,)), lambda: (keys(3),)),
    "permutation": (lambda key: random.permutation(key, 6), lambda: (keys(3),)),
    "fold_in": (random.fold_in, lambda: (keys(3), torch.tensor([0, -1, 2**40]))),
}
