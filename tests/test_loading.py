"""A policy as commands hold it."""

import torch

from rlhf_fn.loading import load_policy, on, without_weights
from rlhf_fn.models import causal_lm, load_causal_lm


def test_a_policy_without_weights_computes_with_those_that_it_is_given(small):
    policy = load_policy(str(small / "model"))
    model, bare = causal_lm(policy.module), without_weights(policy).module
    assert all(p.is_meta for p in bare.parameters())
    tokens = torch.tensor([[5, 6, 7]])
    given = model.params, tokens, tokens > 0
    assert torch.equal(causal_lm(bare).apply(*given), model.apply(*given))


def test_of_what_will_be_in_slices_only_the_buffers_are_moved(small):
    module = on(load_causal_lm(small / "model"), torch.device("meta"), sliced=True)
    assert {x.device.type for x in module.parameters()} == {"cpu"}
    assert {x.device.type for x in module.buffers()} == {"meta"}
