"""TRL's losses of preferences and of teachers against ours, on the same ragged rows.

TRL's own code runs (1.16 is what was compared with); it is no dependency.
"""

from types import SimpleNamespace

import pytest

pytest.importorskip(
    "trl", minversion="1.16", reason="compared with TRL where it is installed: pip install trl"
)

import torch  # noqa: E402
from agreement import ROWS, difference, ragged, scored, tokens, trainer  # noqa: E402
from trl import DPOTrainer, KTOTrainer, RewardTrainer  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

import rlhf_fn as fn  # noqa: E402

SAME = 1e-5
BETA, SHARE = 0.3, 0.1
SMOOTHED = {"beta": BETA, "label_smoothing": SHARE}


def sums(x):
    """log π and log π_ref of the chosen and of the rejected answers."""
    each = (fn.masked_sum(y, x.mask).chunk(2) for y in (x.logprobs, x.ref_logprobs))
    return [y for both in each for y in both]


def means(x):
    each = (fn.masked_mean(y, x.mask).chunk(2) for y in (x.logprobs, x.ref_logprobs))
    return [y for both in each for y in both]


def of(loss, log_probs=sums, **settings):
    return lambda x: loss(*log_probs(x), **settings).mean()


def divergence(reward, **settings):
    """f-DPO: Bradley-Terry of another implicit reward."""

    def loss(x):
        chosen, rejected, ref_chosen, ref_rejected = sums(x)
        good = reward(chosen, ref_chosen, beta=BETA, **settings)
        return fn.bradley_terry(good, reward(rejected, ref_rejected, beta=BETA, **settings)).mean()

    return loss


def desensitised(x):
    lengths = x.mask.sum(-1).chunk(2)
    shared = torch.minimum(*lengths).repeat(2)
    both = (fn.desensitised_logprob(y, shared, x.mask, alpha=0.4) for y in x[0:3:2])
    return fn.dpo(*(y for part in both for y in part.chunk(2)), beta=BETA).mean()


def weighted(x):
    """WPO, of what the stand-in says of the vocabulary: log Σ π² = −entropy."""
    weight = fn.masked_mean(x.logprobs + x.entropy, x.mask).exp().detach().chunk(2)
    return (weight[0] * weight[1] * fn.dpo(*sums(x), beta=BETA)).mean()


def likelihood(x):
    chosen = x.mask[: ROWS // 2]
    return fn.weighted_sum(-x.logprobs[: ROWS // 2], fn.token_mean(chosen))


ALPHA = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
# what TRL's DPOTrainer is set to -> what the same loss is here
PAIRS = {
    "sigmoid": ({}, of(fn.dpo, beta=BETA)),
    "hinge": ({}, of(fn.hinge_dpo, beta=BETA)),
    "ipo": ({}, of(fn.ipo, means, beta=BETA)),
    "exo_pair": ({}, of(fn.exo, **SMOOTHED)),
    "nca_pair": ({}, of(fn.nca, beta=BETA)),
    "robust": ({}, of(fn.robust_dpo, **SMOOTHED)),
    "bco_pair": ({}, of(fn.bco_pair, beta=BETA)),
    "sppo_hard": ({}, of(fn.sppo, beta=BETA)),
    "aot": ({}, of(fn.aot, **SMOOTHED)),
    "aot_unpaired": ({}, of(fn.aot_unpaired, **SMOOTHED)),
    "apo_zero": ({}, of(fn.apo_zero, beta=BETA)),
    "apo_down": ({}, of(fn.apo_down, beta=BETA)),
    "discopop": ({}, of(fn.discopop, beta=BETA, temperature=0.5)),
    "sft": ({}, likelihood),
    "sigmoid_norm": ({}, of(fn.dpo, means, beta=BETA)),
    "sigmoid of the forward KL": (
        {"f_divergence_type": "forward_kl"},
        divergence(fn.alpha_divergence_reward, alpha=1.0),
    ),
    "sigmoid of Jensen-Shannon": (
        {"f_divergence_type": "js_divergence"},
        divergence(fn.jensen_shannon_reward),
    ),
    "sigmoid of an α-divergence": (
        ALPHA,
        divergence(fn.alpha_divergence_reward, alpha=0.7),
    ),
    "sigmoid, desensitised": ({"ld_alpha": 0.4}, desensitised),
    "sigmoid, weighted": ({"use_weighting": True}, weighted),
    "sigmoid and sft": (
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        lambda x: fn.dpo(*sums(x), beta=BETA).mean() + 0.7 * likelihood(x),
    ),
}


def dpo(name, rows, **settings):
    """The loss of TRL's DPOTrainer for these rows, the first half of them chosen."""
    common = {
        "loss_types": [name.split()[0].strip(",")], "loss_weights": [1.0], "beta": BETA,
        "label_smoothing": SHARE, "args": SimpleNamespace(discopop_tau=0.5),
        "f_divergence_type": "reverse_kl", "ld_alpha": None, "precompute_ref_logps": True,
        "use_weighting": False,
    }  # fmt: skip
    lengths = rows.mask.chunk(2)
    ref = fn.masked_sum(rows.ref_logprobs, rows.mask)
    if (alpha := settings.get("ld_alpha")) is not None:  # TRL has these computed beforehand
        shared = torch.minimum(*(m.sum(-1) for m in lengths)).repeat(2)
        ref = fn.desensitised_logprob(rows.ref_logprobs, shared, rows.mask, alpha=alpha)
    chosen, rejected = ref.chunk(2)
    inputs = tokens(rows) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer(DPOTrainer, **common | settings)._compute_loss(scored(rows), inputs, False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PAIRS)
def test_a_loss_of_pairs_is_that_of_trl(name, seed):
    settings, ours = PAIRS[name]
    rows = ragged(seed)
    assert difference(dpo(name, rows, **settings), ours(rows), rows.logprobs) < SAME


def kto(rows, kind, other):
    """TRL's KTOTrainer; the log-probs of mismatched answers are those of `other` rows."""
    made = trainer(
        KTOTrainer, loss_type=kind, beta=BETA, desirable_weight=1.2, undesirable_weight=0.8,
        calculate_KL=kind == "kto", precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: fn.masked_sum(other.logprobs, other.mask),
    )  # fmt: skip
    inputs = tokens(rows) | {
        "label": rows.advantages > 0,
        "ref_logps": fn.masked_sum(rows.ref_logprobs, rows.mask),
        "ref_KL_logps": fn.masked_sum(other.ref_logprobs, other.mask),
    }
    return made._compute_loss(scored(rows), inputs, False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_a_loss_of_single_answers_is_that_of_trl(kind, seed):
    rows, other = ragged(seed), ragged(seed + 50)
    everyone = torch.ones(ROWS, dtype=torch.bool)
    mismatched = (fn.masked_sum(y, other.mask) for y in (other.logprobs, other.ref_logprobs))
    z = fn.kto_baseline(*mismatched, everyone) if kind == "kto" else 0.0
    both = (fn.masked_sum(y, rows.mask) for y in (rows.logprobs, rows.ref_logprobs))
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    ours = fn.kto(*both, rows.advantages > 0, beta=BETA, baseline=z, **weights).mean()
    assert difference(kto(rows, kind, other), ours, rows.logprobs) < SAME


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("with_margin", "coef"), [(False, None), (True, None), (True, 0.01)])
def test_the_reward_models_loss_is_that_of_trl(with_margin, coef, seed):
    scores = (4 * ragged(seed).advantages).requires_grad_()
    margin = ragged(seed + 50).advantages[: ROWS // 2].abs() if with_margin else None
    made = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=coef))
    inputs = {} if margin is None else {"margin": margin}
    theirs = made.compute_loss(lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    good, bad = scores.chunk(2)
    ours = fn.bradley_terry(good, bad, margin=0.0 if margin is None else margin)
    ours = ours + fn.centring_penalty(good, bad, coef=coef or 0.0)
    assert difference(theirs, ours.mean(), scores) < SAME


def cpo(chosen, rejected, **settings):
    common = {"beta": 2.0, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    return trainer(CPOTrainer, **common | settings).cpo_loss(chosen, rejected)[0]


# what TRL's CPOTrainer is set to -> the same without a reference, of an answer's log-probs
ALONE = {
    "cpo": ({"loss_type": "sigmoid"}, lambda good, bad: fn.cpo(good, bad, beta=2.0, alpha=0.0)),
    "simpo": ({"loss_type": "simpo"}, lambda good, bad: fn.simpo(good, bad, beta=2.0, margin=0.5)),
    "alphapo": (
        {"loss_type": "simpo", "alpha": 0.25},
        lambda good, bad: fn.alphapo(good, bad, beta=2.0, margin=0.5, alpha=0.25),
    ),
    "slic": (
        {"loss_type": "hinge", "beta": 1.0},
        lambda good, bad: fn.slic(good, bad, good, margin=1.0, coef=0.0),
    ),
    "ipo without a reference": (
        {"loss_type": "ipo"},
        lambda good, bad: fn.ipo(good, bad, 0 * good.detach(), 0 * bad.detach(), beta=2.0),
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ALONE)
def test_a_loss_without_a_reference_is_that_of_trl(name, seed):
    settings, ours = ALONE[name]
    rows = ragged(seed)
    pair = fn.masked_mean(rows.logprobs, rows.mask).chunk(2)
    assert difference(cpo(*pair, **settings), ours(*pair), rows.logprobs) < SAME


@pytest.mark.parametrize("seed", range(5))
def test_the_odds_ratio_of_orpo_is_that_of_trl(seed):
    rows = ragged(seed)
    chosen, rejected = fn.masked_mean(rows.logprobs, rows.mask).chunk(2)
    theirs = trainer(ORPOTrainer, beta=0.1).odds_ratio_loss(chosen, rejected)[0]
    ours = -chosen - fn.orpo(chosen, rejected, coef=0.1)
    assert difference(theirs, ours, rows.logprobs) < SAME


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_divergence_between_student_and_teacher_is_that_of_trl(beta, seed):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, ROWS, 11, 13, generator=draw)
    student.requires_grad_()
    mask = ragged(seed).mask
    labels = torch.where(mask, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta)
    ours = fn.weighted_sum(fn.generalised_jsd(student, teacher, beta=beta), fn.token_mean(mask))
    assert difference(theirs, ours, student) < SAME


def vocabulary(x, width=13):
    """Logits and a teacher's, made of these rows."""
    student = x.logprobs[..., None] * torch.linspace(-1, 1, width)
    return student, x.ref_logprobs[..., None] * torch.linspace(-2, 1, width)


def flat(x, beta):
    return GKDTrainer.generalized_jsd_loss(*vocabulary(x), beta=beta, reduction="sum")


# what differs -> (why, theirs, ours with the same setting, ours that is theirs)
DIFFERENCES = {
    "label smoothing of sigmoid": (
        "TRL's sigmoid does not read label_smoothing; here it is conservative DPO's",
        lambda x: dpo("sigmoid", x),
        of(fn.dpo, **SMOOTHED),
        of(fn.dpo, beta=BETA),
    ),
    "ipo of sums": (
        "the paper's log-ratios are of whole answers; TRL takes them per token: `ipo` of means",
        lambda x: dpo("ipo", x),
        of(fn.ipo, beta=BETA),
        of(fn.ipo, means, beta=BETA),
    ),
    "the α of a divergence": (
        "TRL's α is 1 − α here, where α → 0 is the reverse KL and α = 1 the forward one",
        lambda x: dpo("sigmoid", x, **ALPHA),
        divergence(fn.alpha_divergence_reward, alpha=0.3),
        divergence(fn.alpha_divergence_reward, alpha=0.7),
    ),
    "the ends of the divergence": (
        "at β = 0, where the formula is 0, TRL's generalised JSD is a KL divergence; here β is "
        "inside of (0, 1) and the divergence is `full_kl`",
        lambda x: flat(x, 0.0),
        lambda x: fn.generalised_jsd(*vocabulary(x), beta=1e-6).sum(),
        lambda x: fn.full_kl(*reversed(vocabulary(x))).sum(),
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_a_loss_of_pairs_differs_from_trl_it_differs_by_what_is_said(name):
    why, theirs, ours, reconciled = DIFFERENCES[name]
    rows = ragged(3)
    assert difference(theirs(rows), ours(rows), rows.logprobs) > 100 * SAME, why
    assert difference(theirs(rows), reconciled(rows), rows.logprobs) < SAME, why
