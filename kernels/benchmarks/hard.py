"""The inputs on which kernels for log-probs are known to fail, and what a GPU alone can show.

Confident tokens, banned tokens, rows that carry no gradient, ids outside of the vocabulary, the
same bits twice, offsets past 2³¹, memory. Every job is a claim, as in `correctness.py`.
"""

from collections.abc import Iterator
from functools import partial

import bench
import rlhf_kernels
import torch
from bench import Job, Machine, Row
from correctness import by_backward, distance, drawn, plain, require, same_bits, weighed
from correctness import shown as shown
from torch import Tensor

statistics = rlhf_kernels.token_logprobs_and_entropy


def jobs(
    machine: Machine, *, vocab: int = 151936, beyond: int = 2**31, batches=(1, 2, 64, 700)
) -> Iterator[Job]:
    """`beyond`: how many elements the largest logits have at least."""
    yield "confident tokens keep their digits", partial(confident, machine, vocab)
    for name in BANS:
        for dtype in ("bf16", "fp32"):
            label = f"banned: {name}, {dtype}"
            yield label, partial(banned, machine, vocab, name, dtype)
    yield "logits far from 0", partial(far, machine, vocab)
    yield "rows without upstream are not read", partial(unread, machine, vocab)
    yield "an id outside of the vocabulary", partial(outside, machine, vocab)
    for rows in batches:
        yield f"the same bits twice, {rows} rows", partial(twice, machine, rows, vocab)
    yield "opcheck", partial(opcheck, machine)
    for name in OFFSETS:
        yield f"{beyond} elements, {name}", partial(offsets, machine, vocab, beyond, name)
    yield "memory", partial(memory, machine, vocab)
    yield "memory, in place", partial(overwritten, machine, vocab)


def confident(machine: Machine, vocab: int) -> list[Row]:
    """Relative error of log π, and of the token's own gradient 1 − π, down to 1 − π = 10⁻¹²."""
    x = torch.randn(40, vocab, device=machine.device)
    y = torch.randint(vocab, (40,), device=machine.device)
    lead = torch.arange(40.0, device=machine.device)
    x.scatter_(-1, y[:, None], lead[:, None])
    u = x.double() - lead[:, None]
    rest = u.exp().scatter(-1, y[:, None], 0.0).sum(-1)
    logp = rlhf_kernels.token_logprobs(x, y)
    own = gradient(x, y, torch.ones_like(logp)).gather(-1, y[:, None])[:, 0]
    errors = {
        "log π": (logp + rest.log1p()) / rest.log1p(),
        "1 − π": (own - rest / (1 + rest)) / (rest / (1 + rest)),
    }
    return [_held(what, e.abs().max().item(), 1e-6) for what, e in errors.items()]


BANS = {
    "the first half": lambda x, y: torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2,
    "all but two": lambda x, y: torch.arange(x.shape[-1], device=x.device) < x.shape[-1] - 1,
    "one token in two": lambda x, y: torch.rand_like(x.float()) < 0.5,
    "the token itself": lambda x, y: torch.zeros_like(x).scatter(-1, y[..., None], 1.0) > 0,
}


def banned(machine: Machine, vocab: int, name: str, dtype: str) -> list[Row]:
    """−∞ in the logits, but for the token's own unless that is the case."""
    x, y, g = drawn(machine, vocab, dtype)
    ban = BANS[name](x, y).expand_as(x)
    if name != "the token itself":
        ban = ban.scatter(-1, y[..., None], False)
    x, g = x.masked_fill(ban, -torch.inf), g.clone()
    infinite = name == "the token itself"  # log π = −∞
    ours = *statistics(x, y), by_backward(partial(weighed, statistics), x, y, g)
    exact = *plain(x.double(), y), by_backward(partial(weighed, plain), x.double(), y, g)
    rows = []
    for what, a, b in zip(("log π", "H", "∂x"), ours, exact):
        if infinite and what == "log π":
            require(bool((a == -torch.inf).all()), "log π of a banned token is not −∞")
        else:
            least = 1e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
            rows.append(_held(what, max(distance(a, b)), least))
    require(bool((ours[-1][ban] == 0).all()) or infinite, "a banned token has a gradient")
    return rows


def far(machine: Machine, vocab: int) -> list[Row]:
    """Logits moved by ±120 and 10⁴, and a token 100 and 5000 below the rest."""
    rows = []
    x, y, _ = drawn(machine, vocab, "fp32")
    for moved in (-120.0, 120.0, 1e4):
        ours, exact = statistics(x + moved, y), plain((x + moved).double(), y)
        rows += [_held(f"+ {moved:g}", max(distance(a, b)), 1e-5) for a, b in zip(ours, exact)]
    for below in (100.0, 5000.0):
        z = x.scatter(-1, y[..., None], -below)
        ours, exact = statistics(z, y), plain(z.double(), y)
        rows += [_held(f"− {below:g}", max(distance(a, b)), 1e-5) for a, b in zip(ours, exact)]
    return rows


def unread(machine: Machine, vocab: int) -> list[Row]:
    """NaN logits in rows whose upstream gradient is 0."""
    x = torch.randn(8, vocab, device=machine.device)
    y = torch.randint(vocab, (8,), device=machine.device)
    x[::2] = torch.nan
    g = torch.ones(8, device=machine.device)
    g[::2] = 0
    dx = gradient(x, y, g)
    require(bool((dx[::2] == 0).all()), "a row without upstream has a gradient")
    require(bool(dx[1::2].isfinite().all() & (dx[1::2] != 0).any()), "another row has none")
    return [{}]


def outside(machine: Machine, vocab: int) -> list[Row]:
    """On a GPU its row is NaN, the next rows are not, and nothing is asserted on the device."""
    x, ids = torch.randn(4, vocab, device=machine.device), [0, -1, vocab, vocab - 1]
    y = torch.tensor(ids, device=machine.device)
    if machine.device == "cpu":
        raise bench.Skipped("on a CPU it is a ValueError")
    logp = rlhf_kernels.token_logprobs(x, y)
    torch.cuda.synchronize()
    require(logp.isnan().tolist() == [False, True, True, False], f"log π is {logp.tolist()}")
    return [{}]


def twice(machine: Machine, number: int, vocab: int) -> list[Row]:
    """Forward and backward, of one row's slabs and of many rows."""
    x = torch.randn(number, vocab, device=machine.device, dtype=torch.bfloat16)
    y = torch.randint(vocab, (number,), device=machine.device)
    g = torch.randn(number, 2, device=machine.device)
    first, again = (
        (*statistics(x, y), by_backward(partial(weighed, statistics), x, y, g)) for _ in range(2)
    )
    require(all(same_bits(a, b) for a, b in zip(first, again)), "the second run has other bits")
    return [{}]


def opcheck(machine: Machine) -> list[Row]:
    """Every operator that a call of the public functions reaches, as torch.library checks it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "rlhf_kernels":
                calls.setdefault(op, args)
            return op(*args, **(kwargs or {}))

    x, y, g = drawn(machine, 50, "fp32")
    with Watch():
        by_backward(partial(weighed, statistics), x, y, g)
        by_backward(lambda x: rlhf_kernels.full_kl(x, x + 1).sum(), x)
    for op, args in calls.items():
        args = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(op, (args[0].requires_grad_(), *args[1:]))
    return [{"what": str(op)} for op in calls]


OFFSETS = {
    "from the start": lambda x: x,
    "one row in": lambda x: x[1:],
    "without the last step": lambda x: x.view(2, -1, x.shape[-1])[:, :-1],
}


def offsets(machine: Machine, vocab: int, beyond: int, name: str) -> list[Row]:
    """bf16 logits of more elements than 32 bits count; rows from everywhere against the truth."""
    number = beyond // vocab // 2 * 2 + 4
    x = torch.empty(number, vocab, device=machine.device, dtype=torch.bfloat16)
    for part in x.split(max(2**28 // vocab, 1)):
        part.normal_()
    x = OFFSETS[name](x)
    y = torch.randint(vocab, x.shape[:-1], device=machine.device)
    g = torch.randn(*x.shape[:-1], 2, device=machine.device)
    ours = *statistics(x, y), by_backward(partial(weighed, statistics), x, y, g)
    seen = torch.arange(0, y.numel(), max(y.numel() // 16, 1), device=machine.device)
    at = torch.unravel_index(torch.cat([seen, seen.new_tensor([y.numel() - 1])]), y.shape)
    sample = x[at].double()
    exact = *plain(sample, y[at]), by_backward(partial(weighed, plain), sample, y[at], g[at])
    limits = 1e-5, 1e-5, torch.finfo(torch.bfloat16).eps
    names = ("log π", "H", "∂x")
    return [_held(n, max(distance(a[at], b)), e) for n, a, b, e in zip(names, ours, exact, limits)]


def memory(machine: Machine, vocab: int) -> list[Row]:
    """A few numbers per row forward; the gradient, and no more than that, backward."""
    number = 512 if machine.device == "cuda" else 8
    x = torch.randn(number, vocab, device=machine.device, dtype=torch.bfloat16)
    y = torch.randint(vocab, (number,), device=machine.device)
    g = torch.ones(number, device=machine.device)
    few = number * 4 * 64 + 2**16
    forward = machine.peak(lambda: rlhf_kernels.token_logprobs_and_entropy(x, y))
    both = machine.peak(lambda: gradient(x, y, g))
    if machine.device == "cpu":
        return [{"forward": forward, "both": both}]
    require(forward <= few, f"forward held {forward} bytes, more than {few}")
    require(both <= x.nbytes + few, f"backward held {both} bytes of {x.nbytes}")
    return [{"forward": forward, "both": both}]


def overwritten(machine: Machine, vocab: int) -> list[Row]:
    """The gradient in the place of logits that a model made: the same bits, and no second copy."""
    time = 257 if machine.device == "cuda" else 5
    x = torch.randn(2, time, vocab, device=machine.device, dtype=torch.bfloat16)
    y = torch.randint(vocab, (2, time - 1), device=machine.device)
    g = torch.randn(2, time - 1, device=machine.device)

    def taken(inplace: bool) -> Tensor:
        def function(x):
            logits = (1 * x)[:, :-1]
            return (rlhf_kernels.token_logprobs(logits, y, inplace=inplace) * g).sum()

        return by_backward(function, x)

    require(same_bits(taken(True), taken(False)), "the gradient in place has other bits")
    held = {inplace: machine.peak(lambda way=inplace: taken(way)) for inplace in (True, False)}
    if machine.device == "cuda":
        require(held[True] <= held[False] - 0.9 * x.nbytes, f"in place or not, it held {held}")
    return [{"in place": held[True], "not": held[False]}]


def gradient(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """Of Σ g log π in x."""
    return by_backward(lambda x: (rlhf_kernels.token_logprobs(x, y) * g).sum(), x)


def _held(what: str, error: float, allowed: float) -> Row:
    row = {"what": what, "error": error, "allowed": allowed}
    bad = {"status": "FAILED", "why": f"{what}: error {error:.2g}, allowed {allowed:.2g}"}
    return row if error <= allowed else row | bad
