"""What a step will hold is known before it is taken, within 2 % of what the allocator sees."""

from typing import NamedTuple

import pytest
import runs
import tiny
import torch
from cases_steps import CASES, KEY, POLICY, batch_of
from test_fused import peak
from test_lora import everything

from rlhf_fn import room, tree
from rlhf_fn.batches import asked
from rlhf_fn.cli import main
from rlhf_fn.config import ConfigError
from rlhf_fn.linear import linear_token_logprobs_and_entropy
from rlhf_fn.lora import lora
from rlhf_fn.losses import PolicyBatch, policy_loss
from rlhf_fn.models import causal_lm
from rlhf_fn.prefix import shared
from rlhf_fn.projection import of_projection, projected_lm
from rlhf_fn.recompute import checkpointed
from rlhf_fn.room import peak_bytes, planned
from rlhf_fn.steps import _summed, autograd_gradient

each_loss = pytest.mark.parametrize("name", CASES)


class Rows(NamedTuple):
    tokens: torch.Tensor


def test_what_is_let_go_is_not_counted_and_views_are_not_counted_twice():
    def function(x):
        y = (x + 1).view(10, 10)  # 800 bytes
        z = y.T[2:] * 2  # 640 more
        del y
        return (z + 1).sum()  # 640 and 8, in the place of y

    x = torch.zeros(100, dtype=torch.float64)
    assert peak_bytes(function, x) == 1440 == peak(lambda: function(x)) - 16  # of the two scalars


@each_loss
@pytest.mark.parametrize("cut", [lambda x: x, asked, lambda x: shared(asked(x))])
def test_it_is_what_the_allocator_hands_out(name, cut):
    case = CASES[name]
    gradient, args = autograd_gradient(case.loss), (case.params, cut(batch_of(case.batch)), KEY)
    gradient(*args)  # what is made once
    assert peak_bytes(gradient, *args) == pytest.approx(peak(lambda: gradient(*args)), rel=0.02)


def adapter_of(make, module):
    return lora(make, module, make(module).params, everything(module), KEY)


@pytest.mark.parametrize("make", [causal_lm, projected_lm])
@pytest.mark.parametrize("how", [adapter_of, checkpointed])
def test_it_is_so_of_adapters_of_layers_that_compute_again_and_without_logits(make, how):
    apply, params = how(make, tiny.tiny("llama"))
    read = of_projection(linear_token_logprobs_and_entropy)
    more = {"token_logprobs": read} if make is projected_lm else {}
    gradient = autograd_gradient(policy_loss(apply, **POLICY, **more))
    args = params, batch_of(PolicyBatch), KEY
    gradient(*args)
    assert peak_bytes(gradient, *args) == pytest.approx(peak(lambda: gradient(*args)), rel=0.02)


@each_loss
def test_a_planned_gradient_is_the_gradient(name):
    case = CASES[name]
    args = case.params, batch_of(case.batch), KEY
    got, expected = (f(case.loss)(*args) for f in (planned(autograd_gradient), autograd_gradient))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_cannot_fit_is_refused_by_what_it_needs_and_nothing_is_computed(
    microbatches, monkeypatch, capsys
):
    case = CASES["sft"]
    args = case.params, batch_of(case.batch), KEY
    grads = sum(p.nbytes for p in case.params.values())
    needed = peak_bytes(autograd_gradient(case.loss), *args) + grads * (microbatches - 1)
    asked = []

    def counted(loss):
        plain = autograd_gradient(loss)
        return lambda *args: asked.append(type(args[2]).__name__) or plain(*args)

    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        gradient = planned(counted, microbatches=microbatches)(case.loss)
        if enough:
            gradient(*args)
            tokens, said = args[1].tokens.numel(), capsys.readouterr().out
            assert said == f"a step, {tokens} tokens at once: {needed / 2**20:,.1f} MiB\n"
        else:
            with pytest.raises(ConfigError, match="MiB are free: the batch does not fit: lower"):
                gradient(*args)
    assert asked == ["FakeTensor", "Tensor", "FakeTensor"]


@pytest.mark.parametrize("name", ["sft", "policy"])
@pytest.mark.parametrize("rows, time", [(2, 2), (4, 7)])  # gradients are more than the rest; less
def test_of_microbatches_it_is_what_their_sum_holds(name, rows, time, monkeypatch):
    case, needs = CASES[name], []
    monkeypatch.setattr(room, "require_room", lambda what, needed, *_: needs.append(needed))
    batch = tree.map(lambda x: x[:rows, :time], batch_of(case.batch))
    sums = _summed(autograd_gradient(case.loss), 2)
    sums(case.params, batch, KEY)
    _summed(planned(autograd_gradient, microbatches=2)(case.loss), 2)(case.params, batch, KEY)
    held = peak(lambda: sums(case.params, batch, KEY))
    assert needs == [pytest.approx(held, rel=0.02)]


def test_a_larger_batch_is_planned_again_and_a_smaller_one_is_not(monkeypatch, capsys):
    sizes = []
    monkeypatch.setattr(room, "require_room", lambda *_: None)
    monkeypatch.setattr(room, "peak_bytes", lambda *args: sizes.append(len(args[2].tokens)) or 1)
    gradient = planned(lambda loss: lambda *args: None)(CASES["sft"].loss)
    for rows in (10, 3, 10, 11, 12, 11, 30):
        gradient({"w": torch.ones(1)}, Rows(torch.ones(rows, 1)), KEY)
    assert sizes == [10, 12, 30]
    assert capsys.readouterr().out.count("a step, ") == 1


@pytest.mark.parametrize("name, more", [("sft", ()), ("reward", ()), ("dpo", ("--recompute", 1))])
def test_a_command_refuses_what_cannot_fit_before_its_first_step(
    small, tmp_path, monkeypatch, capsys, name, more
):
    monkeypatch.setattr(room, "free_memory", lambda device: 2**14)
    words = *runs.words_of(small, "")[name], *more, "--out", tmp_path / "run"
    assert main([str(word) for word in words]) == 2
    assert " MiB; 0.0 MiB are free: the batch does not fit: lower --ba" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
