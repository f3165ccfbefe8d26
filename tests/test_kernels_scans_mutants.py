"""The tests of the scans fail for every bug that is planted in them, one at a time."""

import pytest
from planted import assert_caught

# the bug -> (file, what it says, what the bug makes of it, and which tests speak of it)
# ruff: noqa: E501
MUTANTS = {
    "maps are composed the other way round": ("scans", "return a * b, b * x + y", "return a * b, a * y + x"),
    "a block does not hand on what it ends with": ("scans", "out = u + decay * y_before", "out = u"),
    "a block hands on what it begins with": ("scans", "tl.arange(0, BLOCK)[None, :] == BLOCK - 1", "tl.arange(0, BLOCK)[None, :] == 0"),
    "the prefix's decay is not shifted": ("scans", "s = t if SUFFIX else t - 1", "s = t"),
    "the gradient of the decay is not shifted": ("scans", "return z, z * _after(y[0])", "return z, z * y[0]"),
    "the suffix is differentiated by itself": ("scans", "    z = _PREFIX(g[0], args[1])\n", "    z = _SUFFIX(g[0], args[1])\n"),
    "the time stride is forgotten": ("scans", "x + row * x_row + t * x_step", "x + row * x_row + t", "any_layout"),
    "a hidden token ends the row": ("backups", "(tl.where(kept, decay, 1.0), n)", "(tl.where(kept, decay, 0.0), n)"),
    "a hidden token tells the one before it something": ("backups", "state = carried_on(tl.where(kept, told, n), BLOCK)", "state = carried_on(told, BLOCK)"),
    "the value of a token is not told": ("backups", "            told += (discount - decay) * v\n", ""),
    "a block forgets the value of the next": ("backups", "n += through * state", "n += 0 * state"),
    "the bootstrap is not discounted": ("backups", "state = discount * tl.load(bootstrap", "state = tl.load(bootstrap"),
    "a token hears itself": ("backups", "kept = _kept(mask, row, m_row, t + 1, m_step, there & (lane > 0))", "kept = _kept(mask, row, m_row, t, m_step, there)"),
    "what is hidden is read": ("backups", "return tl.load(x + row * stride + t * step, mask=kept, other=0.0).to(ACC)", "return tl.load(x + row * stride + tl.maximum(t, 0) * step).to(ACC)"),
    "hidden tokens have returns": ("backups", "tl.where(kept, n + _read(rewards, row, r_row, t, r_step, kept, ACC), 0.0)", "n + _read(rewards, row, r_row, t, r_step, kept, ACC)"),
    "the gradient in values lacks the token before": ("backups", "(discount - decay) * h - g, 0.0)", "-g, 0.0)"),
    "the last token has no part in the bootstrap's gradient": ("backups", "(t <= time) & (lane > 0))", "(t < time) & (lane > 0))"),
    "two gradients are swapped": ("backups", "return _GRADIENT(up[1], g_advantages, ", "return _GRADIENT(up[0], g_advantages, ", "values_and_gradients and gae"),
    "γλ of each row is γ of each row": ("backups", "decay = tl.load(decays + row", "decay = tl.load(discounts + row", "rates_may_be"),
    "rows share the first row's rates": ("backups", "discount = tl.load(discounts + row, mask", "discount = tl.load(discounts + 0 * row, mask", "rates_may_be"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    where = "interpreter and not half"
    assert_caught(MUTANTS[bug], tmp_path, "test_kernels_scans.py", where=where)
