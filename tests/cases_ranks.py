"""What the ranks of a test's world do: functions that a process of its own can import.

The model is a GPT-2, whose norms are float64 with the rest; Llama's are float32 in any model.
"""

import os
from typing import NamedTuple
from unittest import mock

import tiny
import torch
from cases_steps import DPO, POLICY, batch_of
from torch._dynamo.testing import CompileCounterWithBackend

from rlhf_fn import random, ranks, sharding, tree
from rlhf_fn.compiled import compiled_loss
from rlhf_fn.fused import fused_adamw
from rlhf_fn.losses import PolicyBatch, SftBatch, policy_loss, sft_loss
from rlhf_fn.models import causal_lm
from rlhf_fn.optim import adamw, chain, clip_by_global_norm
from rlhf_fn.pair_losses import DpoBatch, preference_loss
from rlhf_fn.steps import (
    autograd_gradient,
    donating_step,
    functional_gradient,
    gradient_step,
    train_state,
)

KEY = random.key(5)
LM = causal_lm(tiny.tiny("gpt2"))
BETAS = {"b1": 0.9, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.01}
OPTIMIZER = chain(clip_by_global_norm(0.5), adamw(3e-3, **BETAS))


def cases(apply):
    return {
        "sft": (sft_loss(apply), SftBatch),
        "dpo": (preference_loss(apply, **DPO), DpoBatch),
        "policy": (policy_loss(apply, **POLICY), PolicyBatch),
    }


CASES = cases(LM.apply)
GRADIENTS = {"autograd": autograd_gradient, "functional": functional_gradient}


def batches(case, rows):
    """Three batches of that many of the five ragged rows, which differ in their order."""
    batch = batch_of(CASES[case][1])
    orders = torch.arange(5), torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 4, 3, 0, 2])
    return [tree.map(lambda x, order=order: x[order[:rows]], batch) for order in orders]


def trajectory(case, rows, gradient, microbatches=1):
    """Parameters, moments and metrics after every one of three steps."""
    step = gradient_step(CASES[case][0], OPTIMIZER, gradient=gradient, microbatches=microbatches)
    return steps_of(step, train_state(LM.params, OPTIMIZER), case, rows)


def steps_of(step, state, case, rows):
    found = []
    for i, batch in enumerate(batches(case, rows)):
        state, metrics = step(state, batch, random.fold_in(KEY, i))
        found.append((tree.map(torch.clone, sharding.whole(tuple(state[:2]))), metrics))
    return found


def data_parallel_trajectories(plans):
    """The trajectory of each (case, rows, gradient, microbatches), by data parallel steps."""
    return [
        trajectory(case, rows, ranks.data_parallel(GRADIENTS[name]), parts)
        for case, rows, name, parts in plans
    ]


class Drawn(NamedTuple):
    tokens: torch.Tensor
    even: torch.Tensor
    value: torch.Tensor


def drawn(prompts, keys):
    """Two rows of each of three kinds for every prompt, each of its prompt and of its key alone."""
    each = prompts.repeat_interleave(2, 0) + keys
    return Drawn(each, each % 2 == 0, each.double().sin())


def drawn_by_rows(counts):
    """`drawn` of so many prompts, by rows, and how many prompts this rank was asked of."""
    seen = []

    def counted(prompts, keys):
        seen.append(len(prompts))
        return drawn(prompts, keys)

    asked = [asked_of(count) for count in counts]
    return [ranks.by_rows(counted)(*each) for each in asked], seen


def asked_of(count):
    return torch.arange(3 * count).view(count, 3), torch.arange(6 * count).view(2 * count, 3) ** 2


def agree_but(rank, **other):
    """All ranks agree on options, rows and weights, but for what `other` of one of them says."""
    what = {"lr": 1e-3, "rows": [[1, 2], [3]], "params": LM.params | {"none": torch.ones(0)}}
    ranks.agree(**what | (other if ranks.place().rank == rank else {}))
    return "agreed"


def vanish(rank, how):
    """Steps, in the second of which one rank dies, or hangs."""
    for step in range(100):
        if step == 1 and ranks.place().rank == rank:
            os.kill(os.getpid(), how)
        ranks.sum_over_ranks(torch.ones(3))


def sharded_trajectories(plans, shards):
    """The trajectories of `plans` with parameters in so many shards, and each rank's bytes."""
    mesh, found = sharding.device_mesh(shards=shards), []
    for case, rows, _, parts in plans:
        step = gradient_step(
            CASES[case][0], OPTIMIZER, microbatches=parts,
            gradient=sharding.fully_sharded(autograd_gradient),
        )  # fmt: skip
        params = sharding.shard(LM.params, mesh)
        found.append(steps_of(step, train_state(params, OPTIMIZER), case, rows))
    return found


def compiled_trajectories(plans, shards):
    """`sharded_trajectories` of compiled losses, and of how many graphs."""
    mesh, counter = sharding.device_mesh(shards=shards), CompileCounterWithBackend("aot_eager")
    gradient, found = sharding.fully_sharded(autograd_gradient), []
    for case, rows, _, parts in plans:
        loss = compiled_loss(CASES[case][0], rows=rows, time=9, backend=counter)
        step = gradient_step(loss, OPTIMIZER, microbatches=parts, gradient=gradient)
        state = train_state(sharding.shard(LM.params, mesh), OPTIMIZER)
        found.append(steps_of(step, state, case, rows))
    return found, counter.frame_count


def donated_trajectories(plans, shards):
    """As above, by steps that write over their state; without shards, by one process alone."""
    optimizer, found = fused_adamw(3e-3, max_norm=0.5, **BETAS), []
    gradient, params = autograd_gradient, tree.map(torch.clone, LM.params)
    if shards:
        optimizer = sharding.on_shards(optimizer)
        gradient = sharding.fully_sharded(gradient)
        params = sharding.shard(params, sharding.device_mesh(shards=shards))
    for case, rows, _, parts in plans:
        step = donating_step(CASES[case][0], optimizer, microbatches=parts, gradient=gradient)
        state = train_state(tree.map(torch.clone, params), optimizer)
        found.append(steps_of(step, state, case, rows))
    return found


ODD = {
    "number": torch.tensor(0.7), "one": torch.ones(1), "few": torch.arange(3.0),
    "none": torch.ones(0, 2), "uneven": torch.arange(10.0).view(5, 2).t().contiguous().t(),
}  # fmt: skip


def odd_leaves(shards):
    """(rows here, whole leaves, gradients, norm) of odd shapes; row i weighs i + 1."""
    params = sharding.shard(ODD, sharding.device_mesh(shards=shards))

    def loss(params, batch, key):
        total = sum((x**2).sum() for x in params.values()) * (batch[0] + 1).sum()
        return total, {}

    gradient = sharding.fully_sharded(autograd_gradient)(loss)
    grads, (total, _) = gradient(params, (torch.arange(4.0),), KEY)
    assert all(g.placements == params[name].placements for name, g in grads.items())
    here = {name: len(x.to_local().reshape(-1)) for name, x in params.items()}
    return here, sharding.whole(params), sharding.whole(grads), total, tree.global_norm(grads)


def agree_in_slices(shards, other):
    """What the ranks say of a state of which rank `other` has one number more than the others."""
    state = state_of(shards)
    if ranks.place().rank == other:
        state[0].params["table"].to_local().view(-1)[:1].add_(1)
    with mock.patch.object(tree, "full", None):  # nobody puts anything together
        ranks.agree(parameters=state)
    return "agreed"


def misused(how):
    params, batch = sharding.shard(ODD, sharding.device_mesh(shards=2)), (torch.ones(2),)

    def loss(params, batch, key):
        return params["one"].sum(), {}

    if how == "plain":
        sharding.fully_sharded(autograd_gradient)(loss)(ODD, batch, KEY)
    if how == "functional":
        sharding.fully_sharded(functional_gradient)(loss)(params, batch, KEY)
    if how == "mesh":
        sharding.device_mesh(shards=3)


def state_of(shards):
    """A state after two steps, sharded so, beside what is no DTensor."""
    params = ODD | {"table": torch.randn(7, 3, generator=torch.manual_seed(0))}
    mesh = sharding.device_mesh(shards=shards)
    optimizer = adamw(0.1, **BETAS)
    state = train_state(sharding.shard(params, mesh), optimizer)

    def loss(params, batch, key):
        return sum((x**3).sum() for x in params.values()) * batch[0].sum(), {}

    step = gradient_step(loss, optimizer, gradient=sharding.fully_sharded(autograd_gradient))
    for _ in range(2):
        state, _ = step(state, (torch.arange(3.0),), KEY)
    return state, {"odd": torch.arange(3), "even": torch.tensor(4.0)}


def bytes_of(trained, shards):
    """(bytes of float tensors in a state, of the gradients) that this rank has of so many."""
    params = {"w": torch.ones(trained // 8, 8)}
    optimizer = sharding.on_shards(fused_adamw(1e-3, **BETAS))
    state = train_state(sharding.shard(params, sharding.device_mesh(shards=shards)), optimizer)

    def loss(params, batch, key):
        return params["w"].sum() * batch[0].sum(), {}

    gradient = sharding.fully_sharded(autograd_gradient)(loss)
    grads, _ = gradient(state.params, (torch.ones(ranks.place().ranks),), KEY)
    floats = [x for x in tree.leaves(state) if x.is_floating_point()]
    return tuple(sum(x.to_local().nbytes for x in each) for each in (floats, grads.values()))
