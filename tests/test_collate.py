"""The batches of a run."""

from functools import partial

from rlhf_fn import collate, data, random


def test_the_batches_of_a_run_are_sorted_by_length_within_a_window():
    rows, key = [data.Example([1] * n, [True] * n) for n in range(2, 50)], random.key(3)
    make = partial(collate.sft_batch, pad=0)
    plain, sorted_ = (
        collate.batches(rows, 4, key, make, window=window, examples=lambda row: (row,))
        for window in (1, 12)
    )

    def seen(batch):
        parts = [batch(step) for step in range(12)]  # an epoch
        lengths = [n for part in parts for n in part.attention.sum(-1).tolist()]
        return sorted(lengths), sum(part.tokens.numel() for part in parts)

    (every, padded), (again, packed) = seen(plain), seen(sorted_)
    assert every == again == [*range(2, 50)]
    assert packed == sum(4 * n for n in range(5, 50, 4)) < padded
