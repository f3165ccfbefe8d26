"""`python kernels/benchmarks/assembly.py`: what the compiler makes of every kernel, without a GPU.

The public functions are called on CPU tensors with Triton told that it has a Hopper GPU and kept
from launching: so each kernel is compiled as a launch compiles it, or shows here that it is not.
TRITON_INTERPRET must not be set.

Two bounds follow from the machine code, as fractions of what a copy reaches. issue: a
multiprocessor issues 4 instructions per clock. in flight: bytes asked for at once, by Little's law.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bench
import rlhf_kernels
import torch
import triton
from bench import DTYPES, Job, Machine, Row
from rlhf_kernels import linear_tiles
from rlhf_kernels import rows as kernel_rows
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

PROCESSORS, REGISTERS, WARPS = 132, 65536, 64  # of a Hopper GPU, of a multiprocessor
CLOCK = 1.98e9
LATENCY = 8e-7  # seconds, of a load from a busy memory
COPY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second, read and written, as measured
COLUMNS = (
    "job", "kernel", "block", "warps", "registers", "spills", "programs", "load bits",
    "per element", "barriers", "tensor cores", "issue H100", "issue H200", "in flight H100",
    "in flight H200",
)  # fmt: skip


shown = partial(bench.told, columns=COLUMNS)


def jobs(
    machine: Machine | None = None, *, dtypes: Sequence[str] = ("bf16", "fp32"),
    number: int = 1024, few: int = 8, vocab: int = 32768,
) -> Iterator[Job]:  # fmt: skip
    """Each public function, its backward pass, both ways of walking a row; then scans."""
    del machine
    for dtype in dtypes:
        for name, (function, count) in FUNCTIONS.items():
            shape = count and few or number, vocab
            yield f"{name} {dtype}", lambda f=function, s=shape, d=dtype: compiled(f, s, d)
        for name, function in PROJECTIONS.items():
            yield f"{name} {dtype}", lambda f=function, d=dtype: projected(f, d)
    for name, function in SCANS.items():
        for shape in ((512, 2048), (8192, 256)):
            yield f"{name} {shape[0]} x {shape[1]}", lambda f=function, s=shape: scanned(f, s)


def _gradient(of: Callable[..., Any]) -> Callable:
    def function(x, y):
        x = x.requires_grad_()
        out = of(x, y)
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(sum(each.sum() for each in outs), x)

    return function


def _of_reference(x, y):
    q = x.clone().requires_grad_()
    torch.autograd.grad(rlhf_kernels.full_kl(x, q).sum(), q)


def _sampled(**support) -> Callable:
    def function(x, y):
        keys = torch.zeros(*y.shape, 2, dtype=torch.int64)
        rlhf_kernels.sample(x, keys, temperature=0.9, **support)

    return function


def _table() -> dict[str, tuple[Callable, bool]]:
    """name -> (function of logits and tokens, whether of few rows)."""
    both = rlhf_kernels.token_logprobs_and_entropy
    table = {
        "log π": (_gradient(rlhf_kernels.token_logprobs), False),
        "log π, few rows": (_gradient(rlhf_kernels.token_logprobs), True),
        "log π, H": (_gradient(both), False),
        "log π, in place": (
            _gradient(lambda x, y: rlhf_kernels.token_logprobs(1 * x, y, inplace=True)),
            False,
        ),
        "log π, softcap, τ": (
            _gradient(lambda x, y: both(x, y, softcap=5.0, temperature=0.7)),
            False,
        ),
        "KL": (_gradient(lambda x, y: rlhf_kernels.full_kl(x, x.detach())), False),
        "KL, few rows": (_gradient(lambda x, y: rlhf_kernels.full_kl(x, x.detach())), True),
        "KL in the reference": (_of_reference, False),
    }
    if hasattr(rlhf_kernels, "sample"):
        table |= {
            "sample": (_sampled(), True),
            "sample, top-k": (_sampled(top_k=50), True),
            "sample, top-p": (_sampled(top_p=0.95), True),
            "greedy": (lambda x, y: rlhf_kernels.greedy(x), True),
        }
    return table


FUNCTIONS = _table()


SCANS = {
    "gae": lambda r, v, mask: sum(rlhf_kernels.gae(r, v, mask, discount=0.99, lam=0.95)),
    "gae, rates per row": lambda r, v, mask: sum(
        rlhf_kernels.gae(r, v, mask, discount=r.detach()[:, :1], lam=0.95, bootstrap=v[:, 0])
    ),
    "discounted_returns": lambda r, v, mask: rlhf_kernels.discounted_returns(r, mask, discount=1.0),
    "suffix_scan": lambda r, v, mask: rlhf_kernels.suffix_scan(r, v),
}


def scanned(function: Callable, shape: tuple[int, int]) -> list[Row]:
    """A row for each kernel of a scan over [rows, time] and of its backward pass."""
    r, v = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    with pretended() as kernels:
        torch.autograd.grad(function(r, v, torch.ones(shape, dtype=torch.bool)).sum(), r)
    return [
        kernel if isinstance(kernel, dict) else _machine_code(name, kernel)[0]
        for name, kernel in kernels.items()
    ]


PROJECTIONS = {
    "projection, kept": lambda *x: rlhf_kernels.linear_token_logprobs(*x, memory=2**36),
    "projection, again": lambda *x: rlhf_kernels.linear_token_logprobs(*x, memory=2**20),
    "projection, H": lambda *x: sum(rlhf_kernels.linear_token_logprobs_and_entropy(*x)),
    "projection, softcap, τ": lambda *x: sum(
        rlhf_kernels.linear_token_logprobs_and_entropy(*x, softcap=30.0, temperature=0.7)
    ),
    "projected KL": lambda h, w, y: rlhf_kernels.linear_full_kl(h, w, h.detach(), w.detach()),
}


def projected(function: Callable, dtype: str) -> list[Row]:
    """A row for each kernel of a projection and its gradients; the products are not run."""
    h, w = (torch.zeros(n, 512, dtype=DTYPES[dtype], requires_grad=True) for n in (256, 8192))
    whole = linear_tiles.gradients

    def launched(h, w, b, parts, wanted, factor=None):
        list(parts)
        return torch.zeros_like(h), torch.zeros_like(w), h.new_empty(0)

    linear_tiles.gradients = launched
    try:
        with pretended() as kernels:
            torch.autograd.grad(function(h, w, torch.zeros(256, dtype=torch.int64)).sum(), (h, w))
    finally:
        linear_tiles.gradients = whole
    return [
        kernel if isinstance(kernel, dict) else _row(name, kernel, h.element_size())
        for name, kernel in kernels.items()
    ]


def compiled(function: Callable, shape: tuple[int, int], dtype: str) -> list[Row]:
    """A row for each kernel that a call of `function` would launch."""
    x, y = torch.zeros(shape, dtype=DTYPES[dtype]), torch.zeros(shape[0], dtype=torch.int64)
    with pretended() as kernels:
        function(x, y)
    return [
        kernel if isinstance(kernel, dict) else _row(name, kernel, x.element_size())
        for name, kernel in kernels.items()
    ]


@contextmanager
def pretended() -> Iterator[dict[str, Any]]:
    """Kernels by name, compiled for a Hopper GPU and not launched; no output is written."""
    if kernel_rows.interpreted():
        raise bench.Skipped("TRITON_INTERPRET is set, so nothing is compiled")
    kernels: dict[str, Any] = {}
    run, interpreted = JITFunction.run, kernel_rows.interpreted
    driver = triton.runtime.driver

    def compile_only(self, *args, grid, warmup, **options):
        try:
            kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            kernels[self.__name__] = {"kernel": self.__name__, "status": "FAILED"} | {
                "why": f"{self.__name__}: {bench.said(error)}"
            }

    if not torch.cuda.is_available():
        driver.set_active(_Hopper())
    JITFunction.run, kernel_rows.interpreted = compile_only, lambda: True
    try:
        yield kernels
    finally:
        JITFunction.run, kernel_rows.interpreted = run, interpreted


class _Hopper:
    """What the compiler asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


# reading machine code


def _row(name: str, kernel: Any, size: int) -> Row:
    row, body, element = _machine_code(name, kernel)
    wide, count = loaded(body)
    flying = row["programs"] * 32 * row["warps"] * count * wide / 8
    moves = count * wide / 8 / element / size
    moves += any(i.startswith("STG") for i in body)  # tensors of logits, read and written
    for gpu, copy in COPY.items():
        issue = 128 * PROCESSORS * CLOCK / row["per element"] * size * moves
        row[f"issue {gpu}"] = issue / copy
        row[f"in flight {gpu}"] = flying * PROCESSORS / LATENCY * moves / copy
    return row


def _machine_code(name: str, kernel: Any) -> tuple[Row, list[str], float]:
    """What is counted in any kernel, its innermost loop, and the elements of a thread there."""
    code, registers, stack = disassembled(kernel.asm["cubin"])
    warps, block = kernel.metadata.num_warps, _block(kernel)
    body, element = innermost(code), block / (32 * warps)
    used = -(-registers // 8) * 8
    row = {
        "kernel": name, "block": block, "warps": warps, "registers": registers, "spills": stack,
        "programs": max(min(REGISTERS // (used * 32 * warps), WARPS // warps, 32), 1),
        "load bits": loaded(body)[0], "per element": len(body) / element,
        "barriers": sum(i.startswith("BAR") for i in body),
        "tensor cores": sum(i.startswith(("HGMMA", "DMMA")) for _, i in code),
    }  # fmt: skip
    return row, body, element


def _block(kernel: Any) -> int:
    names = kernel.src.fn.arg_names
    at = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    return int(at.get("BLOCK", 32 * kernel.metadata.num_warps)) * int(at.get("ROWS", 1))


def disassembled(cubin: bytes) -> tuple[list[tuple[str, str]], int, int]:
    """([(label of a jump's target or "", instruction)], registers, bytes of stack)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([tools / name, option, file.name], capture_output=True, text=True).stdout
            for name, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    found = re.findall(r"^(\.L\w+):|/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(.*?);", text, re.M)
    registers, stack = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))
    return found, registers, stack


def innermost(code: list[tuple[str, str]]) -> list[str]:
    """The instructions of the loop with the most exponentials, or of all if there is no loop."""
    labels = {label: i for i, (label, _) in enumerate(code) if label}
    bodies = [[text for _, text in code if text]]
    for i, (_, text) in enumerate(code):
        jump = re.search(r"BRA.*`\((\.L\w+)\)", text)
        if jump and labels.get(jump[1], i) < i - 1:
            bodies.append([text for _, text in code[labels[jump[1]] : i + 1] if text])
    loops = [b for b in bodies[1:] if _exponentials(b)]
    return max(loops, key=_exponentials) if loops else bodies[0]


def loaded(body: list[str]) -> tuple[int, int]:
    """(bits of the widest loads, how many of them): the narrow ones are numbers of a row."""
    bits = [
        int((re.search(r"\.U?(\d+)", i) or [0, 32])[1])
        for i in body
        if i.startswith(("LDG", "LDS", "LDGSTS"))
    ]
    return max(bits, default=32), bits.count(max(bits, default=32))


def _exponentials(body: list[str]) -> int:
    return sum(i.startswith("MUFU") for i in body)


def main() -> None:
    """The table."""
    rows = bench.run(jobs(), 600, lambda rows: None)
    print(shown(rows))
    raise SystemExit(1 if bench.failed(rows) else 0)


if __name__ == "__main__":
    main()
