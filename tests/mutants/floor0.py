"""Mutants that nobody wrote: cosmic-ray's, of a module of floor 0, against its own tests.

    pip install cosmic-ray
    python tests/mutants/floor0.py kl 100  # a hundred of them at random, and those that live on

It writes to the module while it runs, so run it in a clone. What lived on is in `survivors.md`.
Annotations, and operators that no tensor of floats has (<<, ~, is), would be killed for free: they
are left out.
"""

import ast
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

LAWS = {  # the tests of a module, beside its cases of the contract
    "direct": "direct",
    "groups": "groups batch_advantages",
    "kl": "kl selection",
    "logprobs": "logprobs",
    "offpolicy": "surrogates",
    "policy": "policy surrogates",
    "preference": "preference direct answers",
    "returns": "returns turns",
    "sequence": "sequence",
    "value": "value distillation",
    "weights": "ground distillation sequence",
}
OTHERS = r"_(RShift|LShift|BitXor|Pow|Mod|FloorDiv|Is|IsNot|UAdd|Invert)$"
BITWISE = r"ReplaceBinaryOperator_(?:(?!Bit)\w+_Bit|Bit\w+_(?!Bit))"


def config(module: str) -> str:
    """What cosmic-ray asks for: the module, and the command whose failure kills a mutant."""
    tree = ast.parse(Path(f"rlhf_fn/{module}.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    files = [f"tests/test_{name}.py" for name in LAWS[module].split()]
    wanted = " or ".join([Path(file).name for file in files] + [f"[{name}" for name in names])
    marks = ["-m", "not slow and not compile", "-k", wanted]
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    line = shlex.join([*command, *files, "tests/test_contract.py", *marks])
    return (
        f'[cosmic-ray]\nmodule-path = ["rlhf_fn/{module}.py"]\ntimeout = 300.0\n'
        f'excluded-modules = []\ntest-command = """{line}"""\n'
        '[cosmic-ray.distributor]\nname = "local"\n'
    )


def annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where, (line, column), the annotations of a module reach."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    notes = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)) for x in notes if x]


def choose(session: str, number: int, seed: int = 0) -> None:
    """Leave all mutants out but so many at random of those that change what is computed."""
    with use_db(session, WorkDB.Mode.open) as db:
        kept = []
        for item in db.pending_work_items:
            (mutation,) = item.mutations
            name, place = mutation.operator_name, mutation.start_pos
            noted = any(a <= place < b for a, b in annotations(mutation.module_path))
            if noted or re.search(OTHERS, name) or re.search(BITWISE, name):
                db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
            else:
                kept.append((name, mutation.occurrence, item.job_id))
        kept.sort()
        random.Random(seed).shuffle(kept)
        for *_, job in kept[number:]:
            db.set_result(job, WorkResult(WorkerOutcome.SKIPPED))
        print(f"{len(kept)} mutants, {min(len(kept), number)} of them tried", flush=True)


def report(session: str) -> None:
    """The share that was killed, and what the others changed."""
    with use_db(session, WorkDB.Mode.open) as db:
        results = [result for _, result in db.results]
    tried = [x for x in results if x.worker_outcome == WorkerOutcome.NORMAL]
    alive = [x for x in tried if x.test_outcome == TestOutcome.SURVIVED]
    for result in alive:
        lines = (result.diff or "").splitlines()
        print("\n".join(x for x in lines if re.match(r"[-+](?![-+])", x)), "\n")
    print(f"{len(tried) - len(alive)} of {len(tried)} killed")


def main(module: str, number: str = "100", seed: str = "0") -> None:
    settings, session = f"{module}.toml", f"{module}.sqlite"
    Path(settings).write_text(config(module))
    subprocess.run(["cosmic-ray", "init", "--force", settings, session], check=True)
    choose(session, int(number), int(seed))
    subprocess.run(["cosmic-ray", "baseline", settings], check=True)
    subprocess.run(["cosmic-ray", "exec", settings, session], check=True)
    report(session)


if __name__ == "__main__":
    main(*sys.argv[1:])
