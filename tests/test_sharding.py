"""Sharded parameters take the steps of whole ones."""

import cases_ranks
import pytest
import torch
from cases_ranks import ODD, trajectory
from worlds import Failed, world

from rlhf_fn import tree

EXACT = {"rtol": 0, "atol": 1e-12}
PLANS = [("sft", 1, "autograd", 1), ("policy", 5, "autograd", 2)]


@pytest.fixture(scope="module")
def alone():
    return [
        trajectory(case, rows, cases_ranks.GRADIENTS[name], parts)
        for case, rows, name, parts in PLANS
    ]


MORE = [(1, 1), (2, 2), (4, 4)]
SOME = [(4, 2), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)]


@pytest.mark.parametrize("ranks, shards", SOME)
def test_any_number_of_shards_takes_the_steps_of_whole_parameters(alone, ranks, shards):
    for found in world(ranks, cases_ranks.sharded_trajectories, PLANS, shards):
        torch.testing.assert_close(found, alone, **EXACT)


@pytest.mark.compile
def test_a_compiled_loss_of_shards_is_one_graph_and_takes_the_steps_of_whole_parameters():
    plans = [("policy", 5, "autograd", 1)]
    alone = [trajectory("policy", 5, cases_ranks.GRADIENTS["autograd"])]
    for found, graphs in world(2, cases_ranks.compiled_trajectories, plans, 2):
        torch.testing.assert_close(found, alone, **EXACT)
        assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks, shards", [(2, 2), (4, 2), (4, 4)])
def test_donated_shards_take_the_steps_of_donated_parameters(ranks, shards):
    alone = cases_ranks.donated_trajectories(PLANS, 0)
    for found in world(ranks, cases_ranks.donated_trajectories, PLANS, shards):
        torch.testing.assert_close(found, alone, **EXACT)


@pytest.mark.parametrize("ranks, shards", [(1, 1), (4, 4), (4, 2)])
def test_leaves_of_any_shape_are_held_once_per_replica_and_have_the_gradient_of_the_whole(
    ranks, shards
):
    found = world(ranks, cases_ranks.odd_leaves, shards)
    weights = 1 + 2 + 3 + 4
    expected = {name: 2 * weights * x for name, x in ODD.items()}
    for _, params, grads, total, norm in found:
        torch.testing.assert_close(params, ODD, rtol=0, atol=0)
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(total, weights * sum((x**2).sum() for x in ODD.values()))
        torch.testing.assert_close(norm, tree.global_norm(expected))
    for name, x in ODD.items():
        held = [here[name] for here, *_ in found]
        assert sum(held) == x.numel() * (ranks // shards if x.ndim else ranks)
        assert max(held) == (-(-len(x) // shards) * x[:1].numel() if x.ndim else 1)


@pytest.mark.parametrize(
    "how, message",
    [
        ("plain", "TypeError: params: number is no DTensor; pass what `shard` made"),
        ("functional", "TypeError: params: number is no DTensor"),
        ("mesh", "ValueError: shards is 3, which does not divide the 2 ranks"),
    ],
)
def test_misuse_is_an_error_on_every_rank(how, message):
    for found in world(2, cases_ranks.misused, how):
        assert isinstance(found, Failed) and message in str(found)
