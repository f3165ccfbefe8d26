"""What a person looks at after a run: report.md, with plots and samples."""

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

PLOTS = {  # a plot each: its title, and the metrics drawn in it where the run has them
    "loss": ("loss", "loss/value"),
    "held-out loss": ("held-out loss",),
    "accuracy": ("accuracy", "held-out accuracy"),
    "reward": ("reward",),
    "rewards of a pair, nats": ("reward/chosen", "reward/rejected"),
    "log-probs of a pair, nats per token": ("logprob/chosen", "logprob/rejected"),
    "KL to the reference, nats per token": ("kl/token",),
    "KL coefficient": ("kl/coef",),
    "length, tokens": ("length",),
    "entropy, nats": ("entropy",),
    "clip fraction": ("clip/fraction",),
}


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int | float, trials: int, *, confidence: float = 0.95) -> Interval:
    """The share of successes with Wilson's score interval, which holds near 0 and 1 too.

    (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n).  Ties count as half a success.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if trials < 1:
        raise ValueError(f"wilson: trials is {trials}; an interval needs one trial or more")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    scale = 1 + z * z / trials
    return Interval(share, (centre - spread) / scale, (centre + spread) / scale)


def normal(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean with its normal interval, x̄ ± z s/√n."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean) ** 2 for x in values) / max(n - 1, 1)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * (variance / n) ** 0.5
    return Interval(mean, mean - half, mean + half)


def win_rate(tuned: Sequence[float], base: Sequence[float]) -> Interval:
    """How often `tuned` is preferred over `base` on the same prompt; ties are half a win."""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(tuned, base, strict=True))
    return wilson(wins, len(tuned))


def _plot(path: Path, title: str, stage: str, series: dict[str, list[tuple[int, float]]]) -> None:
    from matplotlib.figure import Figure  # slow to import, and only a report needs it

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points), label=name, linewidth=1.2)
    axes.set(title=f"{stage}: {title}", xlabel="step")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    figure.savefig(path, dpi=100)


def _plots(directory: Path, records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        rows = [record for record in records if record["stage"] == stage]
        for title, names in PLOTS.items():
            series = {name: [(r["step"], r[name]) for r in rows if name in r] for name in names}
            series = {name: points for name, points in series.items() if points}
            if series:
                name = f"{stage}-{title.split(',')[0].replace(' ', '-')}.png"
                _plot(directory / "plots" / name, title, stage, series)
                lines.append(f"![{stage}: {title}](plots/{name})")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ⏎ ")


def write(
    directory: Path,
    *,
    title: str,
    results: dict[str, str],
    records: list[dict[str, Any]],
    samples: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Write `report.md`: the results, a plot per metric and stage, and (prompt, before, after)."""
    (directory / "plots").mkdir(exist_ok=True)
    lines = [f"# {title}", "", "| result | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in results.items()]
    lines += ["", "## Curves", "", *_plots(directory, records)]
    if samples:
        lines += ["", "## Samples", "", "| prompt | before | after |", "|---|---|---|"]
        lines += [f"| {_cell(a)} | {_cell(b)} | {_cell(c)} |" for a, b, c in samples]
    (directory / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
