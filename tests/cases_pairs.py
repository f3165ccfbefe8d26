"""The formulas of `pair_recipes.py` as their papers have them, over lists of ordinary numbers.

A pair p has `w` and `l`, log π of its answers, `rw` and `rl`, the reference's, `nw` and `nl`, their
lengths, `ws`, `ls`, `rws` and `rls`, the same token by token, and log-ratios `x3` and `x4` of
mismatched answers.
"""

import math
from types import SimpleNamespace


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def h(p):
    return (p.w - p.rw) - (p.l - p.rl)


def a(p):
    return p.w - p.rw


def b(p):
    return p.l - p.rl


def means(p):
    fields = {"w": p.nw, "l": p.nl, "rw": p.nw, "rl": p.nl}
    return SimpleNamespace(**{x: getattr(p, x) / n for x, n in fields.items()})


def exo(p):
    s = sigmoid(0.1 * h(p))
    return s * math.log(s / 0.999) + (1 - s) * math.log((1 - s) / 0.001)


def discopop(p):
    m = 0.05 * h(p)
    gate = sigmoid(m / 0.05)
    return (1 - gate) * -log_sigmoid(m) + gate * math.exp(-m)


def robust(p):
    return (0.9 * -log_sigmoid(0.01 * h(p)) - 0.1 * -log_sigmoid(-0.01 * h(p))) / 0.8


def nca(p):
    x, y = 0.01 * a(p), 0.01 * b(p)
    return -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)


def classifier(p, beta, shift):
    return -log_sigmoid(beta * a(p) - shift) - log_sigmoid(shift - beta * b(p))


def desensitised(p):
    shared = min(p.nw, p.nl)

    def total(x):
        return sum(v if t < shared else 0.5 * v for t, v in enumerate(x))

    return (total(p.ws) - total(p.rws)) - (total(p.ls) - total(p.rls))


def log_odds(x):
    return math.log(math.exp(x) / (1 - math.exp(x)))


def alphapo(p):
    p = means(p)
    good, bad = ((1 - math.exp(x) ** -0.25) / 0.25 for x in (p.w, p.l))
    return -log_sigmoid(2.5 * good - 2.5 * bad - 0.1)


def of_alpha_divergence(p):
    good, bad = (0.1 * (1 - math.exp(x) ** -0.5) / 0.5 for x in (a(p), b(p)))
    return -log_sigmoid(good - bad)


def of_jensen_shannon(p):
    good, bad = (0.1 * math.log(2 * math.exp(x) / (1 + math.exp(x))) for x in (a(p), b(p)))
    return -log_sigmoid(good - bad)


def each(formula):
    return lambda pairs: sum(map(formula, pairs)) / len(pairs)


def transported(first, second):
    """-log σ(0.1 (sorted first - sorted second))"""
    return lambda pairs: (
        -sum(
            log_sigmoid(0.1 * (x - y))
            for x, y in zip(sorted(map(first, pairs)), sorted(map(second, pairs)))
        )
        / len(pairs)
    )


def mean_reward(pairs, beta):
    return beta * sum(a(p) + b(p) for p in pairs) / (2 * len(pairs))


def bco(pairs):
    return each(lambda p: classifier(p, 0.01, mean_reward(pairs, 0.01)))(pairs)


def mpo(pairs):
    def mixture(p):
        quality = classifier(p, 0.1, mean_reward(pairs, 0.1))
        return 0.8 * -log_sigmoid(0.1 * h(p)) + 0.2 * quality - p.w / p.nw

    return each(mixture)(pairs)


def kto(pairs):
    z = max(0.0, sum(p.x3 + p.x4 for p in pairs) / (2 * len(pairs)))
    return each(lambda p: (1 - sigmoid(0.1 * (a(p) - z)) + 1 - sigmoid(0.1 * (z - b(p)))) / 2)(
        pairs
    )


FORMULAS = {
    "dpo": each(lambda p: -log_sigmoid(0.1 * h(p))),
    "cdpo": each(lambda p: -0.9 * log_sigmoid(0.1 * h(p)) - 0.1 * log_sigmoid(-0.1 * h(p))),
    "dpo_norm": each(lambda p: -log_sigmoid(5 * h(means(p)))),
    "ipo": each(lambda p: (h(means(p)) - 1 / (2 * 0.1)) ** 2),
    "hinge": each(lambda p: max(0, 1 - 0.05 * h(p))),
    "robust_dpo": each(robust),
    "exo": each(exo),
    "nca": each(nca),
    "sppo": each(lambda p: (a(p) - 500) ** 2 + (b(p) + 500) ** 2),
    "apo_zero": each(lambda p: 1 - sigmoid(0.1 * a(p)) + sigmoid(0.1 * b(p))),
    "apo_down": each(lambda p: sigmoid(0.1 * a(p)) + 1 - sigmoid(0.1 * h(p))),
    "discopop": each(discopop),
    "bco_pair": each(lambda p: classifier(p, 0.01, 0.0)),
    "f_dpo_alpha": each(of_alpha_divergence),
    "f_dpo_jensen_shannon": each(of_jensen_shannon),
    "ld_dpo": each(lambda p: -log_sigmoid(0.1 * desensitised(p))),
    "rpo": each(lambda p: -log_sigmoid(0.1 * h(p)) - p.w / p.nw),
    "aot": transported(lambda p: p.w - p.l, lambda p: p.rw - p.rl),
    "aot_unpaired": transported(a, b),
    "bco": bco,
    "mpo": mpo,
    "kto": kto,
    "simpo": each(lambda p: -log_sigmoid(2 * means(p).w - 2 * means(p).l - 1)),
    "alphapo": each(alphapo),
    "orpo": each(
        lambda p: -means(p).w - 0.1 * log_sigmoid(log_odds(means(p).w) - log_odds(means(p).l))
    ),
    "cpo": each(lambda p: -log_sigmoid(0.1 * (p.w - p.l)) - p.w),
    "slic": each(lambda p: max(0, 1 - p.w + p.l) - 0.1 * p.w),
}
