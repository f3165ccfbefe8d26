"""The tests of the fused projection fail for every bug that is planted in it, one at a time."""

import pytest
from planted import assert_caught

LAWS = "test_kernels_linear.py", "test_kernels_linear_hits.py"

# the bug -> (file, what it says, what the bug makes of it, and which tests speak of it)
# ruff: noqa: E501
MUTANTS = {
    "tokens beyond the vocabulary count": ("linear_tiles", "    if token + BN > vocab:\n", "    if token + BN > vocab + 10**6:\n"),
    "the bias is forgotten": ("linear_tiles", "    if BIAS:\n", "    if BIAS and 1 < 0:\n"),
    "the width's end is left out": ("linear_tiles", "range(0, width, h.block_shape[1])", "range(0, width - h.block_shape[1] + 1, h.block_shape[1])"),
    "the old sums are not moved": ("linear_tiles", "return higher, s * tl.exp2(step), w", "return higher, s, w"),
    "w is not moved": ("linear_tiles", "(w + step * s) * tl.exp2(step)", "w * tl.exp2(step)"),
    "a weight's part is written to the next": ("linear_tiles", "_write_product(dw[at], dx.mT, left)", "_write_product(dw[at], dx.mT.flip(0), left)"),
    "the gradient in hidden is that of the last part": ("linear_tiles", "        out.addmm_(a.to(out.dtype), b.to(out.dtype))", "        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)"),
    "hidden's gradient has no factor of its row": ("linear_tiles", "        dh *= factor[:, None]\n", "        dh *= factor.mean()\n"),
    "the bias's gradient has no factor": ("linear_tiles", "dx.mT @ factor.to(dx.dtype)", "dx.sum(0)"),
    "the token's own term is summed": ("linear_kernels", "        if has(tl.load(y + row), first, BN):\n", "        if has(tl.load(y + row) + vocab, first, BN):\n"),
    "a slab begins one tile late": ("linear_kernels", "for first in range(part * slab, tl.minimum", "for first in range(part * slab + BN * tl.minimum(part, 1), tl.minimum"),
    "the temperature is forgotten": ("linear_kernels", "    t = tl.zeros([BM], ACC) + scale_of(scale, row, scale_stride, SCALED, ACC) * LOG2E\n", "    t = tl.zeros([BM], ACC) + LOG2E\n"),
    "the entropy is left in bits": ("linear_kernels", "tl.store(partial + 2, moment * LN2, mask=inside)", "tl.store(partial + 2, moment, mask=inside)"),
    "the token's dot product has no last block": ("linear_kernels", "mask = first + k < width\n", "mask = first + k < width - 1\n"),
    "what is kept stays around an old centre": ("linear_kernels", "* tl.exp((before - c) * t)[:, None]", "* tl.exp(0 * (before - c) * t)[:, None]"),
    "what is kept for the token has no sign": ("linear_kernels", "-others[:, None], e)", "others[:, None], e)"),
    "kept rows that are no number spread": ("linear_kernels", "            e = tl.where(e < float(\"inf\"), e, 0.0)", "            e = tl.where(e < float(\"inf\"), e, e)", "without_upstream"),
    "a row that needs no gradient is read": ("linear_kernels", "h, factor = torch.where(read[:, None], h, 0), None", "factor = None", "without_upstream"),
    "the upstream of the first row serves all": ("linear_kernels", "    g = tl.load(g + row)\n", "    g = tl.load(g + 0 * row)\n"),
    "the entropy's gradient has no mean": ("linear_kernels", "(tl.maximum(logp, -1e4) * LN2 + mean[:, None])", "(tl.maximum(logp, -1e4) * LN2)"),
    "the token's own entropy gradient is left out": ("linear_kernels", "own += gz * t - gh * t * tl.exp(a) * (tl.maximum(a, -1e4) + mean)", "own += gz * t"),
    "the gradient of the token is that of the others": ("linear_kernels", "own = g * tl.where(read, tl.load(rest + row), 0.0) * t\n", "own = -g * (1 - tl.where(read, tl.load(rest + row), 0.0)) * t\n"),
    "the cap has no slope": ("linear_kernels", "            d *= slope(x, CAP)\n", "            d *= 1.0\n"),
    "logits are rounded to half precision": ("linear_kernels", "        z = capped(x, CAP)\n        if has", "        z = capped(x.to(tl.float16).to(ACC), CAP)\n        if has"),
    "the entropy's gradient is not that of what is kept": ("linear_kernels", "    if keep and not full:\n", "    if keep:\n"),
    "what is kept for the token is read as its logit": ("linear_kernels", "            d = tl.where(rn[None, :] == tl.load(y + row)[:, None], own[:, None], d)\n", "            d = tl.where((rn[None, :] == tl.load(y + row)[:, None]) & (KEPT == 0), own[:, None], d)\n"),
    "what is kept is not divided by its sum": ("linear_kernels", 'float("inf")) * LOG2E)[:, None]\n', 'float("inf")) * LOG2E * (1 - KEPT))[:, None]\n'),
    "the part of what is kept is the first": ("linear_kernels", "kept.load([block * BM, token])", "kept.load([block * BM, token - first])", "computed_again"),
    "a token within the margin is no higher": ("linear_kernels", "tops.amax(-1) if keep and not full else centre", "centre", "no_other_outweighs"),
    "the highest logit is the last tile's": ("linear_kernels", "highest = tl.maximum(highest, top)", "highest = top", "no_other_outweighs"),
    "the highest logit is the first slab's": ("linear_kernels", "tops.amax(-1)", "tops[:, 0]", "no_other_outweighs"),
    "a row that is no number has a hit": ("linear_kernels", " & ~logp.isnan()", "", "no_number_has"),
    "parts overlap": ("linear_tiles", "slice(first, min(first + size, vocab))", "slice(max(first - 1, 0), min(first + size, vocab))"),
}  # fmt: skip


ON_CPU = {
    "the entropy forgets what is kept": ("linear_cpu", "    into.copy_(_finite(e))\n    return c, s * step.exp() + e.sum(-1), _moment(s, m, step, u, e)\n", "    into.copy_(_finite(e))\n    return c, s * step.exp() + e.sum(-1), m\n"),
    "units are given no factor of the row": ("linear_cpu", "[some] * factor[:, None] if", "[some] if", "multiplies_bfloat16"),
    "units round each part of a sum": ("linear_cpu", "(kept[:, : len(w)] @ w)[some]", "sum(kept[:, at] @ w[at] for at in tiles.chunks(len(w), 16))[some]", "multiplies_bfloat16"),
    "what is kept is read of rows that need no gradient": ("linear_cpu", "parts = ((at, kept[some, at].to(dtype))", "parts = ((at, kept[: len(y), at].to(dtype))", "multiplies_bfloat16"),
    "the moment is not moved": ("linear_cpu", "(m + step * s) * step.exp()", "m * step.exp()"),
    "the entropy's gradient is left out of what is kept": ("linear_cpu", "    if keep and not full:\n", "    if keep:\n"),
    "the entropy's gradient is never asked for": ("linear_cpu", "    of_others = (gh != 0) | (gz != 0)\n", "    of_others = gz != 0\n"),
    "the centre is taken for the highest logit": ("linear_cpu", "(none, last[0] if keep else c)", "(none, c)", "no_other_outweighs"),
    "the highest logit is the last part's": ("linear_cpu", "top.maximum(higher)", "higher", "no_other_outweighs"),
    "logits are compared before the cap": ("linear_cpu", "    top = z.amax(-1)\n", "    top = x.amax(-1)\n"),
    "the token's own logit is summed": ("linear_cpu", "        put(x, y, at, -torch.inf)\n", ""),
    "a row that is no number has a hit": ("linear_cpu", "(chosen == top) & ~logp.isnan()", "(chosen == top)", "no_number_has"),
    "logits below the token's are hits": ("linear_cpu", "(chosen == top) & ", "(chosen <= top) & ", "no_other_outweighs"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    assert_caught(MUTANTS[bug], tmp_path, *LAWS, where="interpreter")


@pytest.mark.slow
@pytest.mark.parametrize("bug", ON_CPU)
def test_a_bug_planted_in_the_path_on_a_cpu_is_caught(bug, tmp_path):
    assert_caught(ON_CPU[bug], tmp_path, *LAWS, where="cpu")
