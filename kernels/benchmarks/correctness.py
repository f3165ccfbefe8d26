"""Are the kernels right on this GPU? Every job is a claim; one that does not hold is FAILED.

The truth is float64. Ours may be 1.5 times as far from it as floor 0 is in float32, or 1e-6, or one
rounding of a half-precision result, whichever is most; as a maximum and as a norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import bench
import rlhf_kernels
import torch
from bench import DTYPES, Job, Machine, Row
from torch import Tensor
from torch.func import grad, vmap

import rlhf_fn

SLACK = 1.5
VOCABS = (1, 2, 37, 1000, 4095, 4096, 4097, 32000, 50257, 128256, 151936)
HALVES = ("bf16", "fp16")


def jobs(
    machine: Machine, *, vocabs: Sequence[int] = VOCABS, middle: int = 4097, slack: float = SLACK,
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
) -> Iterator[Job]:  # fmt: skip
    """Dtypes, vocabularies, strides, transforms and options, against float64."""
    check = partial(agree, machine, slack=slack)
    for dtype in dtypes:
        for vocab in vocabs:
            yield f"V {vocab} {dtype}", partial(check, vocab, dtype)
    dtypes = [dtype for dtype in dtypes if dtype != "fp16"]
    for name in LAYOUTS:
        for dtype in dtypes:
            yield f"{name} {dtype}", partial(check, middle, dtype, layout=name)
    for name in OPTIONS:
        yield f"{name} fp32", partial(check, middle, "fp32", options=name)
    for dtype in dtypes:
        for vocab in (37, middle, vocabs[-1]):
            yield f"KL V {vocab} {dtype}", partial(agree_on_kl, machine, vocab, dtype, slack=slack)
    for name in MODES:
        for dtype in dtypes:
            yield f"{name} {dtype}", partial(check, middle, dtype, mode=name)
            yield f"compiled {name} {dtype}", partial(check, middle, dtype, mode=name, graph=True)


def shown(rows: Sequence[Row]) -> str:
    """How many claims hold, and which do not."""
    bad = [f"- {row['job']}: {row['status']}, {row['why']}" for row in rows if "why" in row]
    held = sum(row["status"] == "ok" for row in rows)
    return "\n".join([f"{held} of {len(rows)} claims hold.", "", *bad])


# what is compared


def plain(x: Tensor, y: Tensor, temperature: Tensor | float = 1.0, softcap: float | None = None):
    """(log π, H) by the formula, in the dtype of x."""
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    return rlhf_fn.token_logprobs(z / temperature, y), rlhf_fn.entropy(z / temperature)


def weighed(statistics: Callable, x: Tensor, y: Tensor, g: Tensor, **options) -> Tensor:
    """A scalar of both outputs, each with an upstream gradient of its own."""
    logp, entropy = statistics(x, y, **options)
    return (logp * g[..., 0].to(logp.dtype) + entropy * g[..., 1].to(logp.dtype)).sum()


def by_backward(function: Callable, x: Tensor, *data: Tensor) -> Tensor:
    """The gradient as autograd takes it."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, *data), x)[0]


MODES: Mapping[str, Callable] = {
    "backward": by_backward,
    "func.grad": lambda f, *args: grad(f)(*args),
    "vmap(grad)": lambda f, *args: vmap(grad(f))(*args),
}
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "all but the last step": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1))[..., :-1, :],
    "transposed batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one element in": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view_as(x),
    "vocabulary strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand_as(x),
}
OPTIONS: Mapping[str, Callable[[Tensor], dict]] = {
    "temperature": lambda x: {"temperature": 0.7},
    "temperature per row": lambda x: {"temperature": 0.5 + torch.rand_like(x[..., :1]).float()},
    "softcap": lambda x: {"softcap": 5.0},
    "softcap and temperature": lambda x: {"softcap": 5.0, "temperature": 0.7},
}


def drawn(machine: Machine, vocab: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [2, 3, vocab], tokens, two upstream gradients for each)."""
    generator = torch.Generator(machine.device).manual_seed(vocab)
    options = {"device": machine.device, "generator": generator}
    x = torch.randn(2, 3, vocab, **options).mul_(3).to(DTYPES[dtype])
    return x, torch.randint(vocab, (2, 3), **options), torch.randn(2, 3, 2, **options)


def agree(
    machine: Machine, vocab: int, dtype: str, *, slack: float, layout: str | None = None,
    mode: str = "backward", graph: bool = False, options: str | None = None,
) -> list[Row]:  # fmt: skip
    """log π, H and the gradient of both, of ours, of floor 0 and of the truth."""
    x, y, g = drawn(machine, vocab, dtype)
    x = LAYOUTS[layout](x) if layout else x
    more = OPTIONS[options](x) if options else {}
    if graph:
        bench.compiled_anew()

    def results(statistics: Callable, x: Tensor, mode: str, graph: bool = False):
        function = partial(weighed, statistics, **more)
        if graph and mode == "backward":
            gradient = partial(by_backward, machine.compiled(function))
        else:
            gradient = partial(MODES[mode], function)
            gradient = machine.compiled(gradient) if graph else gradient
        return *statistics(x, y, **more), gradient(x, y, g)

    ours = results(rlhf_kernels.token_logprobs_and_entropy, x, mode, graph)
    alone = rlhf_kernels.token_logprobs(x, y, **more)
    if machine.device == "cuda":  # on a CPU the sums of each are around a centre of their own
        require(same_bits(alone, ours[0]), "log π alone is not log π with H, to the bit")
    eager, exact = results(plain, x, "backward"), results(plain, x.double(), "backward")
    names = "log π", "H", "∂x", "log π alone"
    ours, eager, exact = (*ours, alone), (*eager, eager[0]), (*exact, exact[0])
    return verdict(dict(zip(names, zip(ours, eager, exact))), slack)


def agree_on_kl(machine: Machine, vocab: int, dtype: str, *, slack: float) -> list[Row]:
    """KL and its gradients in both logits."""
    x, y, g = drawn(machine, vocab, dtype)
    q = (x + torch.randn_like(x)).to(torch.float32 if dtype in HALVES else x.dtype)

    def results(divergence: Callable, x: Tensor, q: Tensor):
        x, q = (each.detach().requires_grad_() for each in (x, q))
        out = divergence(x, q)
        return out.detach(), *torch.autograd.grad(out, (x, q), g[..., 0].to(out.dtype))

    def joint(x, q):
        return rlhf_kernels.token_logprobs_and_kl(x, q, y).kl

    eager, exact = results(rlhf_fn.full_kl, x, q), results(rlhf_fn.full_kl, x.double(), q.double())
    rows = []
    for name, function in {"full_kl": rlhf_kernels.full_kl, "joint": joint}.items():
        each = zip(results(function, x, q), eager, exact)
        names = (f"{name} {what}" for what in ("KL", "∂x", "∂q"))
        rows += verdict(dict(zip(names, each)), slack)
    return rows


# verdicts


def verdict(triples: dict[str, tuple[Tensor, Tensor, Tensor]], slack: float) -> list[Row]:
    """A row for each quantity of (ours, floor 0's, the truth)."""
    rows = []
    for what, (ours, eager, exact) in triples.items():
        require(ours.shape == exact.shape, f"{what} has shape {tuple(ours.shape)}")
        mine, theirs = distance(ours, exact), distance(eager, exact)
        least = max(torch.finfo(ours.dtype).eps, 1e-6)
        good = all(a <= max(slack * b, least) for a, b in zip(mine, theirs))
        row = {"what": what, "error": max(mine), "floor 0": max(theirs), "allowed": least}
        bad = {"status": "FAILED", "why": f"{what}: {mine} of ours, {theirs} of floor 0"}
        rows.append(row if good else row | bad)
    return rows


def distance(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """How far from the truth, relative to it: at most, and as a norm. NaN is infinitely far."""
    gap, exact = x.double() - exact.double(), exact.double()
    sizes = exact.abs().amax().clamp(min=1e-30), exact.norm().clamp(min=1e-30)
    both = torch.stack([gap.abs().amax(), gap.norm()]) / torch.stack(sizes)
    return tuple(both.nan_to_num(torch.inf).tolist())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def require(holds: bool, otherwise: str) -> None:
    """Fail the job unless the claim holds."""
    if not holds:
        raise AssertionError(otherwise)
