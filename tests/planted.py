"""A bug planted in a copy of the kernels, and whether their tests notice."""

from pathlib import Path

from mutants.plant import TESTS, judge, plant

KERNELS = TESTS.parent / "kernels" / "rlhf_kernels"


def assert_caught(bug: tuple[str, str, str], folder: Path, *files: str, where: str) -> None:
    """`bug` is (module, what it says, what the bug makes of it); an assertion of `files` must fail.

    `where` is pytest's -k: the tests of what the kernels compute, not of how they compose.
    """
    plant(KERNELS, *bug, folder)
    verdict = judge(" ".join(files), folder, "-x", "-k", where)
    assert verdict.caught, verdict.output[-3000:]
