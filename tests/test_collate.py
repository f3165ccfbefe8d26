"""The batches of a run."""

from functools import partial
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from rlhf_fn import collate, data, random
from rlhf_fn.batches import asked
from rlhf_fn.prefix import Prefixed, shared, with_prefix


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


# answers to prompts

lengths = st.lists(
    st.tuples(st.integers(0, 6), st.lists(st.integers(1, 6), min_size=2, max_size=2)),
    min_size=1, max_size=5,
)  # fmt: skip


def rows_of(lengths):
    """Answers of those lengths to prompts of those, all of them of other tokens."""
    number = iter(range(1, 10_000))

    def answer(prompt, length):
        mask = [False] * len(prompt) + [True] * length
        return data.Example([*prompt, *islice(number, length)], mask)

    prompts = [list(islice(number, length)) for length, _ in lengths]
    return [tuple(answer(p, n) for n in each) for p, (_, each) in zip(prompts, lengths)]


@given(lengths)
def test_answers_are_padded_and_nothing_else_happens_to_them(lengths):
    rows = rows_of(lengths)
    tokens, attention, mask = collate.pad_answers(rows, 0)
    assert tokens.shape[-1] == max(len(x.tokens) for row in rows for x in row)
    for row, *of_row in zip(rows, tokens, attention, mask):
        for example, there, real, answer in zip(row, *of_row):
            assert there[real].tolist() == example.tokens and not there[~real].any()
            assert answer[real].tolist() == example.mask and not answer[~real].any()


@given(lengths)
def test_no_other_column_for_prompts_to_end_at_leaves_less_to_read(lengths):
    rows = rows_of(lengths)
    batch = asked(collate.pair_batch(rows, 0))
    width, last = batch.tokens.shape[-1], batch.mask.shape[-1]
    column = min(width - max(answers) for _, answers in lengths)
    assert width - last == (parting := max(min(column, width - 2), 0))

    def read(c):  # where prompts end at c, or after it
        return c + 2 * max(p - min(p, c) + max(answers) for p, answers in lengths)

    assert column + 2 * (width - column) == min(map(read, range(8)))
    assert isinstance(shared(batch).tokens, Prefixed) == (parting >= 2)


def test_prompts_of_all_lengths_are_read_once():
    rows = rows_of([(2, [3, 1]), (5, [3, 3]), (4, [1, 2])])
    tokens, attention, _ = collate.pad_answers(rows, 0)
    assert attention.int().tolist() == [
        [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]],
        [[1] * 8, [1] * 8],
        [[0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]],
    ]
    once, _ = with_prefix(tokens, attention, 3)
    assert sum(x.numel() for x in once) == 3 * (5 + 2 * 3) < tokens.numel()


@given(lengths, st.integers(2, 12), st.integers(0, 1))
def test_the_ends_that_are_kept_have_one_prompt_and_begin_as_they_did(lengths, length, head):
    for row in rows_of([(p + head, answers) for p, answers in lengths]):
        ends = collate.keep_ends(row, length, head=head)
        before = collate.prompt_length(row)
        left = [len(x.mask) - sum(x.mask) for x in ends]
        assert left[0] == left[1] >= head
        assert max(len(x.tokens) for x in ends) == min(length, max(len(x.tokens) for x in row))
        for x, (tokens, mask) in zip(row, ends):
            last = len(tokens) - head
            assert tokens == x.tokens[:head] + x.tokens[len(x.tokens) - last :]
            assert mask == x.mask[:head] + x.mask[len(x.tokens) - last :]
            assert sum(mask) == min(len(x.tokens) - before, length - head)


def test_an_answer_that_is_all_prompt_or_none_is_padded_too():
    rows = [(data.Example([1, 2], [False, False]), data.Example([1, 2, 3], [False, False, True]))]
    tokens, attention, mask = collate.pad_answers(rows, 9)
    assert tokens.tolist() == [[[1, 2, 9], [1, 2, 3]]] and mask.sum() == 1
    assert attention.sum() == 5
