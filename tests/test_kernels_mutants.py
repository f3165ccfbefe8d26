"""The tests of the kernels fail for every bug that is planted in them, one at a time."""

import pytest
from planted import assert_caught

# the bug -> (file, what it says, what the bug makes of it, and which tests speak of it)
# ruff: noqa: E501
MUTANTS = {
    "the token's own term is summed twice": ("statistics", "(at < stop) & (at != y) & once", "(at < stop) & once"),
    "the mask of the last block is dropped": ("statistics", "(at < stop) & (at != y) & once", "(at < stop + 3) & (at != y) & once"),
    "the last block is off by one": ("statistics", "(at < stop) & (at != y)", "(at < stop - 1) & (at != y)"),
    "the last block is left out": ("statistics", "for i in range(2):\n        at, inside = left_over(i, v, start, stop, whole, home, y)\n        z = tl.load", "for i in range(1):\n        at, inside = left_over(i, v, start, stop, whole, home, y)\n        z = tl.load"),
    "the token's block is counted twice": ("statistics", "tl.where(skipped, float(\"inf\"), c)) * t\n    e =", "c) * t\n    e ="),
    "no maximum is subtracted": ("statistics", "    if top > c:\n", "    if top > c + 1e30:\n"),
    "the old sums are not moved": ("statistics", "        s = s * tl.exp2(step)\n", ""),
    "w is not moved": ("statistics", "(w + step * s) * tl.exp2(step)", "w * tl.exp2(step)"),
    "the temperature is forgotten in the sums": ("statistics", "c, t = start_at(chosen), t * LOG2E", "c, t = start_at(chosen), 0.0 * t + LOG2E"),
    "the entropy is left in bits": ("statistics", "tl.sum(w) * LN2\n", "tl.sum(w)\n"),
    "log(1 + s) loses a small s": ("statistics", "tl.where(s < 1, 2 * t * series, tl.log(1 + s))", "tl.log(1 + s)", "confident_token"),
    "a banned token is capped": ("statistics", "x = tl.where(x == -float(\"inf\"), x, CAP * _tanh(x / CAP))", "x = CAP * _tanh(x / CAP)", "banned_token"),
    "the cap has no slope": ("statistics", "x = 1 - a * a\n", "x = 1 - 0 * a\n"),
    "the inner stride is the outer": ("statistics", "row % inner * inner_stride", "row % inner * outer_stride"),
    "the vocabulary's stride is forgotten": ("statistics", "(first + v).to(tl.int64) * stride", "(first + v).to(tl.int64)", "any_layout"),
    "the upstream of the first row serves all": ("logprobs", "g, gh = tl.load(g + row), tl.load(gh + row)", "g, gh = tl.load(g), tl.load(gh)"),
    "two gradients are swapped": ("logprobs", "_GRADIENT(*args, *out[1:], *upstream)", "_GRADIENT(*args, *out[1:], *upstream[::-1])"),
    "the gradient of the token is that of the others": ("logprobs", "tl.where(v == token, g * tl.load(rest + row), -g * p)", "-g * p"),
    "1 − π is taken from a rounded π": ("logprobs", "g * tl.load(rest + row), -g * p)", "g - g * p, -g * p)", "confident_token"),
    "a row that needs no gradient is read": ("logprobs", "if (g == 0) & (gh == 0):", "if (g == 7) & (gh == 0):", "without_upstream"),
    "the entropy's gradient has no mean": ("logprobs", "logp + tl.load(entropy + row)", "logp"),
    "a slab begins one token late": ("logprobs", "start, stop = part * slab,", "start, stop = part * slab + 1,"),
    "slabs are added around different centres": ("logprobs", "    s = s * tl.exp(move)\n", ""),
    "logits are rounded to half precision": ("statistics", "stride).to(c.dtype), CAP)\n        s, w, c = added(z, first == home", "stride).to(tl.float16).to(c.dtype), CAP)\n        s, w, c = added(z, first == home"),
    "a tangled layout is walked by two strides": ("rows", "    if len(axes) > 2:\n", "    if len(axes) > 9:\n", "any_layout"),
    "the reference's centre does not move the divergence": ("statistics", "d + (top_q - cq) * t * s", "d"),
    "the divergence is turned round": ("divergence", "difference - z + zq", "-difference + z - zq"),
    "its gradient has no mean": ("divergence", "(logp - logq - tl.load(kl + row))", "(logp - logq)"),
    "slabs of the reference are added around different centres": ("divergence", "r * tl.exp(move_q)", "r"),
    "the divergence of a slab is not moved": ("divergence", "(d + (move - move_q) * s) * tl.exp(move)", "d * tl.exp(move)"),
    "tokens as likely as the likeliest are lost, on a CPU": ("cpu", "(total - others).round() - one", "1 - one", "half_precision"),
    "sums that overflow are kept, on a CPU": ("cpu", "outputs[1].log().abs() < far", "outputs[1].log().abs() <= float(\"inf\")"),
    "the chosen token is one of the others, on a CPU": ("cpu", "own[:, 0].to(dx.dtype)", "dx[:, 0].clone()"),
    "the log-ratio is not centred, on a CPU": ("cpu", "(u - o) - (total - total_q)[:, None]", "u - o"),
    "the reference's gradient has the sign of the policy's": ("divergence", "gk * (tl.exp(logq) - p)", "gk * (p - tl.exp(logq))"),
}  # fmt: skip
OVERWRITING = {
    "the gradient goes past the end of a row of logits": ("logprobs", "        dx = at\n", "        dx = at + 1\n"),
    "logits that are a leaf are written over": ("rows", "plain and not x.is_leaf and", "plain and", "otherwise"),
    "logits that lie on each other are written over": ("rows", "stride < extent", "stride < 0", "otherwise"),
    "logits are written over unasked": ("logprobs", "if inplace and rows", "if rows", "otherwise"),
    "logits of a subclass are written over": ("rows", "type(x) is Tensor and not transformed", "not transformed", "otherwise"),
    "logits inside of a transform are written over": ("rows", "not transformed and", "True and", "otherwise"),
    "logits that a second derivative needs are written over": ("rows", " and not torch.is_grad_enabled()", "", "otherwise"),
    "nobody is told that the logits are gone": ("logprobs", "        increment_version(args[0])", "        pass", "whoever"),
    "the gradient is written to a copy of the logits, on a CPU": ("cpu", "logprobs_overwrite(part, y, scale, cap, entropy, *rest)", "logprobs_overwrite(part.clone(), y, scale, cap, entropy, *rest)"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    path = "cpu" if MUTANTS[bug][0] == "cpu" else "interpreter"
    assert_caught(MUTANTS[bug], tmp_path, "test_kernels_logits.py", where=path)


@pytest.mark.slow
@pytest.mark.parametrize("bug", OVERWRITING)
def test_a_bug_planted_where_logits_are_overwritten_is_caught(bug, tmp_path):
    how = {"where": "not compiled", "most": "inplace"}
    assert_caught(OVERWRITING[bug], tmp_path, "test_kernels_inplace.py", **how)
