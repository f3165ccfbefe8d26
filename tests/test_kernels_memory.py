"""The memory that the benchmark counts on fake tensors is the memory that a step takes."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels" / "benchmarks"))

import bench  # noqa: E402
import memory  # noqa: E402
import rlhf_kernels as ours  # noqa: E402
import torch  # noqa: E402
from rlhf_kernels import cpu  # noqa: E402

TINY = memory.Size(vocab=500, width=16, inner=24, layers=1, heads=2, groups=1)


@pytest.mark.parametrize("way", ["logits, floor 0", "no logits, floor 0"])
@pytest.mark.parametrize("rows, length", [(3, 40)])
def test_what_is_counted_is_what_the_allocator_sees(way, rows, length):
    (row,) = memory.checked(TINY, way, rows, length)
    assert row["counted MB"] == pytest.approx(row["measured MB"], rel=1e-3)


@pytest.mark.slow
def test_the_rows_that_fit_fill_the_budget_and_one_more_does_not():
    (row,) = memory.fitted(TINY, "logits, floor 0", 40, [0.005, 0.02], tokens=400)
    for budget in (0.005, 0.02):
        rows = row[f"rows in {budget} GB"]
        counts = [memory.counted(TINY, "logits, floor 0", n, 40) for n in (rows, rows + 1)]
        assert counts[0] <= budget * 1e9 < counts[1]
    assert not bench.failed([row])


@pytest.mark.slow
def test_without_logits_more_fits():
    small = [memory.counted(TINY, way, 4, 40) for way in memory.ways()]
    assert small[0] == max(small) and small[2] < small[1]


@pytest.mark.compile
@pytest.mark.skipif(not cpu._compiles(), reason="there is no C++ compiler")
def test_the_logits_of_all_but_the_last_token_are_not_copied(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, y = torch.randn(2, 129, cpu.LARGE // 128)[:, :-1], torch.zeros(2, 128).long()
    size = logits.numel() * logits.itemsize

    def backward(x):
        return torch.autograd.grad(ours.token_logprobs(x, y).sum(), x)

    for call in (lambda: ours.token_logprobs(logits, y), lambda: backward(logits.requires_grad_())):
        call()  # compiles
        assert bench._peak_on_cpu(call) < 0.1 * size + size * logits.requires_grad
