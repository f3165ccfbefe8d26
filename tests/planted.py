"""A bug planted in a copy of the kernels, and whether their tests notice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
KERNELS = TESTS.parent / "kernels" / "rlhf_kernels"


def assert_caught(bug: tuple[str, str, str], folder: Path, *files: str, where: str) -> None:
    """`bug` is (module, what it says, what the bug makes of it); an assertion of `files` must fail.

    `where` is pytest's -k: the tests of what the kernels compute, not of how they compose.
    """
    name, right, wrong = bug
    shutil.copytree(KERNELS, folder / "rlhf_kernels")
    file = folder / "rlhf_kernels" / f"{name}.py"
    source = file.read_text()
    assert source.count(right) == 1
    file.write_text(source.replace(right, wrong))
    paths = os.pathsep.join([str(folder), str(TESTS.parent)])
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", where]
    done = subprocess.run(
        [*command, *(str(TESTS / each) for each in files)],
        env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    asserted = ("AssertionError", "Mismatch", "DID NOT RAISE")
    assert done.returncode == 1 and any(each in done.stdout for each in asserted)
