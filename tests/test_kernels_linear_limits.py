"""The fused projection never holds logits, computes what nobody asked for, or takes anything."""

import sys
from pathlib import Path

import pytest
import torch
from cases_linear import AGAIN, FUNCTIONS, KEPT, bytes_of, gradients, path, problem
from rlhf_kernels import linear, linear_cpu
from rlhf_kernels import linear_tiles as tiles

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "benchmarks"))
import bench  # noqa: E402

__all__ = ["path"]  # a fixture

each = pytest.mark.parametrize("name", FUNCTIONS)
how = pytest.mark.parametrize("memory", [KEPT, AGAIN], ids=["kept", "again"])


@how
def test_a_gradient_is_computed_only_if_it_is_asked_for(memory, path, monkeypatch):
    hidden, weight, tokens, bias = problem(6)
    memory = bytes_of(memory, hidden, weight)
    _, all_three = gradients(
        FUNCTIONS["log π"][0], hidden, weight, tokens, bias, [torch.ones(6)], memory=memory
    )
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    frozen = {"hidden": (hidden.detach(), weight), "weight": (hidden, weight.detach())}
    for name, product in (("weight", "_write_product"), ("hidden", "_add_product")):
        h, w = frozen[name]
        out = linear.linear_token_logprobs(h, w, tokens, bias, memory=memory).sum()
        with monkeypatch.context() as patch:
            patch.setattr(tiles, product, lambda *_: pytest.fail("a product nobody asked for"))
            (alone,) = torch.autograd.grad(out, hidden if name == "weight" else weight)
        torch.testing.assert_close(alone, all_three[name == "hidden"])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_logits_is_ever_held(name, dtype, monkeypatch):
    """By the profiler, on a CPU: forward and backward, beside the gradients, within `memory`."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(linear_cpu.cpu, "_compiles", lambda: False)
    monkeypatch.setattr(linear_cpu.cpu, "CACHED", 2**14)  # what eager torch takes at a time
    rows, width, vocab, memory = 512, 16, 8192, 2**21
    hidden, weight, tokens, bias = problem(rows, width=width, vocab=vocab, dtype=dtype)

    def step():
        upstream = [torch.ones(rows)] * 2
        return gradients(FUNCTIONS[name][0], hidden, weight, tokens, bias, upstream, memory=memory)

    step()
    gradients_of = hidden.nbytes + weight.nbytes + bias.nbytes
    per_row = rows * (16 * 4 + 4 * width * 4)
    peak = bench.cpu().peak(step)
    assert peak <= gradients_of + per_row + memory + 2**20, f"{peak / 2**20:.1f} MiB"
    assert peak < rows * vocab * 4 / 3


X = problem(2, 3, vocab=7, width=8)
BAD = {
    "another width": (lambda h, w, y, b: (h[..., :5], w, y, b), {}, ValueError, "hidden and"),
    "a transposed weight": (lambda h, w, y, b: (h, w.T, y, b), {}, ValueError, "hidden and weight"),
    "no vocabulary": (lambda h, w, y, b: (h, w[:0], y, b[:0]), {}, ValueError, "vocab"),
    "another dtype": (lambda h, w, y, b: (h, w.double(), y, b), {}, TypeError, "one dtype"),
    "integers": (lambda h, w, y, b: (h.long(), w.long(), y, b), {}, TypeError, "hidden"),
    "a bias of integers": (lambda h, w, y, b: (h, w, y, b.long()), {}, TypeError, "bias"),
    "a bias per row": (lambda h, w, y, b: (h, w, y, b[:3]), {}, ValueError, "bias"),
    "a weight elsewhere": (lambda h, w, y, b: (h, w.to("meta"), y, b), {}, ValueError, "weight"),
    "tokens elsewhere": (lambda h, w, y, b: (h, w, y.to("meta"), b), {}, ValueError, "device"),
    "tokens of another shape": (lambda h, w, y, b: (h, w, y[:, :2], b), {}, ValueError, "tokens"),
    "a token beyond": (lambda h, w, y, b: (h, w, y + 7, b), {}, ValueError, "tokens"),
    "tokens that are floats": (lambda h, w, y, b: (h, w, y.float(), b), {}, TypeError, "tokens"),
    "a temperature of 0": (lambda *x: x, {"temperature": 0.0}, ValueError, "temperature"),
    "a temperature per token": (
        lambda *x: x, {"temperature": torch.ones(2, 3)}, ValueError, "temperature"
    ),
    "a negative softcap": (lambda *x: x, {"softcap": -1.0}, ValueError, "softcap"),
    "too little memory": (lambda *x: x, {"memory": 6 * 7 * 4 - 1}, ValueError, "memory"),
}  # fmt: skip


@each
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_any_launch(what, name):
    make, options, error, words = BAD[what]
    with pytest.raises(error, match=words):
        FUNCTIONS[name][0](*make(*X), **options)
