"""Two policies answer the same prompts, and a judge says which answer is better."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fn import random, tree
from rlhf_fn.logprobs import full_kl
from rlhf_fn.models import Params
from rlhf_fn.ranks import by_rows
from rlhf_fn.report import Interval, normal, win_rate
from rlhf_fn.rollout import Prompts, Rollout, sample
from rlhf_fn.sampler import Sampling

Judge = Callable[[Rollout, range], Sequence[float]]  # of answers to the prompts so numbered


class Verdict(NamedTuple):
    """Scores and texts per prompt; KL(tuned ‖ base) per token of the tuned answers, nats."""

    tuned: list[float]
    base: list[float]
    kl: list[float]
    samples: list[tuple[str, str, str]]  # prompt, before, after

    @property
    def results(self) -> dict[str, str]:
        wins: Interval = win_rate(self.tuned, self.base)
        return {
            "win rate over the reference, 95 % interval": str(wins),
            "score of the reference, 95 % interval": str(normal(self.base)),
            "score of the tuned policy, 95 % interval": str(normal(self.tuned)),
            "KL(tuned ‖ reference), nats per token": f"{sum(self.kl) / len(self.kl):.3f}",
            "prompts": str(len(self.tuned)),
        }


def texts(tokenizer: Any, rollout: Rollout) -> list[tuple[str, str]]:
    """(prompt, answer) of every row."""
    asked = rollout.attention & ~rollout.mask

    def decode(keep: Tensor) -> list[str]:
        rows = [row[kept].tolist() for row, kept in zip(rollout.tokens, keep)]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    return list(zip(decode(asked), decode(rollout.mask)))


@torch.no_grad()
def duel(
    reads: Sampling,
    tuned: Params,
    base: Params,
    prompts: Sequence[Prompts],
    judge: Judge,
    tokenizer: Any,
    key: Tensor,
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
    pad: int,
) -> Verdict:
    """Sample both policies on every prompt with the same keys, and judge each answer.

    The ranks share the prompts out.
    """
    both = reads.gather(tuned), reads.gather(base)

    def answers(asked: Prompts, keys: Tensor) -> tuple[Rollout, Rollout, Tensor]:
        after, before = (
            sample(
                reads.engine, params, asked, keys, max_new_tokens=new_tokens,
                temperature=temperature, stop=stop, pad=pad,
            )
            for params in both
        )  # fmt: skip
        logits, ref = (reads.apply(p, after.tokens, after.attention)[:, :-1] for p in both)
        return after, before, full_kl(logits / temperature, ref / temperature)

    verdict = Verdict([], [], [], [])
    for i, asked in enumerate(prompts):
        numbers = range(len(verdict.tuned), len(verdict.tuned) + len(asked.tokens))
        keys = random.split(random.fold_in(key, i), len(asked.tokens))
        after, before, kl = by_rows(answers)(*tree.beside((asked, keys), tuned))
        verdict.kl.extend(kl[after.mask[:, 1:]].tolist())
        verdict.tuned.extend(judge(after, numbers))
        verdict.base.extend(judge(before, numbers))
        pairs = zip(texts(tokenizer, after), texts(tokenizer, before))
        verdict.samples.extend((asked, old, new) for (asked, new), (_, old) in pairs)
    return verdict
