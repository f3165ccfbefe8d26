"""A bug planted in a copy of the kernels, and whether their tests notice."""

from pathlib import Path

from mutants.plant import TESTS, judge, plant

KERNELS = TESTS.parent / "kernels" / "rlhf_kernels"


def assert_caught(
    bug: tuple[str, ...], folder: Path, *files: str, where: str, most: str = "values_and_gradients"
) -> None:
    """An assertion of the tests in `files` that speak of a bug must fail.

    `bug` is (module, what it says, what the bug makes of it) and, unless those are `most`, which
    tests speak of it; `where` says how the kernels run. These are pytest's -k.
    """
    module, right, wrong, *law = bug
    plant(KERNELS, module, right, wrong, folder)
    verdict = judge(" ".join(files), folder, "-x", "-k", " and ".join([where, *(law or [most])]))
    assert verdict.caught, verdict.output[-3000:]
