"""Are projections without logits right on this GPU? Claims as those of `correctness.py`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import rlhf_kernels
import torch
from bench import DTYPES, Job, Machine, Row
from correctness import SLACK, shown, verdict
from torch import Tensor

import rlhf_fn

__all__ = ["jobs", "shown"]

Size = tuple[int, int, int]
SIZES = (  # tokens, width, vocabulary
    (1, 128, 151936), (37, 72, 1), (64, 24, 1000), (300, 896, 4097), (1000, 2048, 32000),
)  # fmt: skip
LEAST = 256 * 8  # bytes a token: a small part of the vocabulary at a time


def jobs(
    machine: Machine, *, sizes: Sequence[Size] = SIZES, slack: float = SLACK,
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
) -> Iterator[Job]:  # fmt: skip
    """Every dtype and size, against float64."""
    for dtype in dtypes:
        for size in sizes:
            name = f"projection {' x '.join(map(str, size))} {dtype}"
            yield name, partial(agree, machine, size, dtype, slack=slack)


def agree(machine: Machine, size: Size, dtype: str, *, slack: float) -> list[Row]:
    """log π kept and computed again, H, KL, and their gradients in hidden, weight and bias."""
    tokens, width, vocab = size
    generator = torch.Generator(machine.device).manual_seed(vocab)
    options = {"device": machine.device, "generator": generator}
    h, w, b = (torch.randn(*s, **options) for s in ((tokens, width), (vocab, width), (vocab,)))
    h, w, b = (x.to(DTYPES[dtype]) for x in (h, w.mul_(3 / width**0.5), b))
    y, g = torch.randint(vocab, (tokens,), **options), torch.randn(tokens, **options)
    g[::3] = 0  # rows that are not read

    def results(function: Callable, *given: Tensor):
        given = [x.detach().requires_grad_() for x in given]
        out = function(*given)
        return out.detach(), *torch.autograd.grad(out, given, g.to(out.dtype))

    def of_logits(function: Callable) -> Callable:
        return lambda h, w, b: function(h @ w.mT + b)

    def chosen(x: Tensor) -> Tensor:
        return rlhf_fn.token_logprobs(x, y)

    log = rlhf_kernels.linear_token_logprobs
    entropies = rlhf_kernels.linear_token_logprobs_and_entropy
    q = [torch.randn_like(x) * 0.1 + x for x in (h, w)]
    claims = {
        "kept": (lambda h, w, b: log(h, w, y, b, memory=2**36), chosen),
        "again": (lambda h, w, b: log(h, w, y, b, memory=LEAST * tokens), chosen),
        "H": (lambda h, w, b: entropies(h, w, y, b).entropy, rlhf_fn.entropy),
    }
    rows = []
    for name, (ours, theirs) in claims.items():
        exact = results(of_logits(theirs), h.double(), w.double(), b.double())
        plain = results(of_logits(theirs), h.float(), w.float(), b.float())
        each = zip(results(ours, h, w, b), plain, exact)
        rows += verdict(dict(zip((f"{name} {x}" for x in ("", "∂h", "∂W", "∂b")), each)), slack)
    return rows + agree_on_kl(results, (h, w, *q), slack)


def agree_on_kl(results: Callable, given: tuple[Tensor, ...], slack: float) -> list[Row]:
    """The divergence of two projections and its four gradients."""

    def plain(h, w, hq, wq):
        return rlhf_fn.full_kl(h @ w.mT, hq @ wq.mT)

    exact = results(plain, *(x.double() for x in given))
    usual = results(plain, *(x.float() for x in given))
    each = zip(results(rlhf_kernels.linear_full_kl, *given), usual, exact)
    return verdict(dict(zip(("projected KL", "∂h", "∂W", "∂h'", "∂W'"), each)), slack)
