"""What the ranks of a world hold of a model while a command runs."""

import gc
import io
import weakref
from contextlib import nullcontext, redirect_stderr
from unittest import mock

import torch

from rlhf_fn import commands, frame, judge, ranks, sampler, stages, tree
from rlhf_fn.cli import main


def held(words):
    """(bytes of tensors, how many numbers the leaves of the state have) as a command's steps begin.

    And the most numbers that were at any time whole, of those that are in slices, outside of what
    models do.
    """
    begun, together, now = [], [0], weakref.WeakValueDictionary()
    fold, full = stages.fold, tree.full

    def counted(iteration, state, *args, **options):
        begun.append((bytes_of_tensors(), tree.map(lambda x: torch.tensor(x.numel()), state)))
        return fold(iteration, state, *args, **options)

    def put_together(x):
        entire = full(x)
        now[id(entire)] = entire
        together.append(sum(each.numel() for each in now.values()))
        return entire

    with (
        mock.patch.object(stages, "fold", counted),
        mock.patch.object(tree, "full", put_together),
        mock.patch.object(ranks, "joined", lambda **_: nullcontext()),
    ):
        assert main([str(word) for word in words]) == 0
    ((bytes_then, sizes),) = begun
    return bytes_then, sizes, max(together)


def sampled_in(words):
    """The dtypes of the parameters that a command's rollouts are sampled with on this rank."""
    found, sample = set(), sampler.sample

    def seen(reads, params, *rows, **how):
        found.update(x.dtype for x in params.values())
        return sample(reads, params, *rows, **how)

    with mock.patch.object(sampler, "sample", seen):
        held(words)
    return found


def order_of_saving(words):
    """What is put together, and what is written, one after the other."""
    events, full = [], tree.full

    def put_together(x):
        events.append("together")
        return full(x)

    def written(*_, **__):
        events.append("written")

    with (
        mock.patch.object(tree, "full", put_together),
        mock.patch.object(frame, "save_policy", written),
        mock.patch.object(commands, "save_reward_model", written),
        mock.patch.object(ranks, "joined", lambda **_: nullcontext()),
    ):
        assert main([str(word) for word in words]) == 0
    return events


def rows_sampled(words):
    """How many prompts this rank answers, each time that a verdict samples."""
    rows, sample = [], judge.sample

    def counted(engine, params, prompts, *more, **how):
        rows.append(len(prompts.tokens))
        return sample(engine, params, prompts, *more, **how)

    with (
        mock.patch.object(judge, "sample", counted),
        mock.patch.object(ranks, "joined", lambda **_: nullcontext()),
    ):
        assert main([str(word) for word in words]) == 0
    return rows


def evaluated(words, model, other):
    """The exit code of a command, and what it says, where rank 1 reads another model."""
    own = [str(other if ranks.place().rank and word == model else word) for word in words]
    with (
        mock.patch.object(ranks, "joined", lambda **_: nullcontext()),
        redirect_stderr(io.StringIO()) as said,
    ):
        return main(own), said.getvalue()


def bytes_of_tensors():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(x.nbytes() for pointer, x in storages.items() if pointer)
