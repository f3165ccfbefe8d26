"""A bug of the field planted in a copy of the package, and the law that catches it."""

import gc
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

# processes that begin with what takes seconds to import, and without the package
os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
READY = multiprocessing.get_context("forkserver")
MODELS = [f"transformers.models.{each}.modeling_{each}" for each in ("llama", "gpt2", "bert")]
READY.set_forkserver_preload(
    ["torch.func", "torch._dynamo", "triton", "_hypothesis_pytestplugin", "pytest", *MODELS]
)
OPTIONS = ["-q", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-profile=first"]
TESTS = Path(__file__).parent.parent
PACKAGE = TESTS.parent / "rlhf_fn"
ASSERTED = re.compile(r"(AssertionError|assert |Failed: )")  # the last: pytest.raises and fail


class Mutant(NamedTuple):
    """A bug: its row in the catalogue, where it was seen, and what it makes of our source.

    `tests` are those that speak of it, `file::test file::test`; one of them has to fail.
    """

    row: str
    bug: str
    seen: str
    module: str
    right: str
    wrong: str
    tests: str


class Verdict(NamedTuple):
    """The first test that failed and how; no test where all passed."""

    law: str
    how: str
    output: str

    @property
    def caught(self) -> bool:
        """Whether it failed by an assertion."""
        return bool(ASSERTED.match(self.how))


def plant(package: Path, module: str, right: str, wrong: str, folder: Path) -> None:
    """Write a copy of the package into `folder` that says `wrong` in the one place of `right`."""
    source = (package / f"{module}.py").read_text()
    if source.count(right) != 1:
        raise LookupError(f"{module}.py has {source.count(right)} places that say {right!r}")
    replace(package, module, source.replace(right, wrong), folder)


def replace(package: Path, module: str, source: str, folder: Path) -> None:
    """Write a copy of the package into `folder` in which a module reads `source`."""
    compiled = shutil.ignore_patterns(f"{module}.*.pyc")  # of the others it is still good
    shutil.copytree(package, folder / package.name, ignore=compiled)
    (folder / package.name / f"{module}.py").write_text(source)


def judge(selection: str, folder: Path | None = None, *options: str) -> Verdict:
    """Run tests on the package in `folder`, or on ours, in a process of their own."""
    tests = [str(TESTS / each) for each in selection.split()]
    paths = [str(path) for path in (folder, TESTS.parent) if path is not None]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        process = READY.Process(target=_run, args=([*OPTIONS, *options, *tests], paths, log))
        process.start()
        process.join()
        output = log.read_text(errors="replace")
    if process.exitcode not in (0, 1):  # nothing was collected, or pytest was interrupted
        raise RuntimeError(output[-3000:])
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S.*?) - (.*)$", output, re.MULTILINE)
    if process.exitcode and not failed:
        raise RuntimeError(output[-3000:])
    return Verdict(*failed.groups(), output) if failed else Verdict("", "", output)


def _run(arguments: list[str], paths: list[str], log: Path) -> None:
    """What the new process does: pytest, with the planted package before any other."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "400"}
    sys.path[:0] = paths
    os.chdir(paths[0])  # where processes that it starts look first
    sys.dont_write_bytecode = True
    gc.freeze()  # pytest collects garbage: not among all that was preloaded
    sys.exit(int(pytest.main(arguments)))


def replay(mutant: Mutant, folder: Path) -> Verdict:
    """What the tests that speak of a bug say, once it is planted."""
    plant(PACKAGE, mutant.module, mutant.right, mutant.wrong, folder)
    return judge(mutant.tests, folder, "-x")
