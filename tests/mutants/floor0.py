"""Mutants that nobody wrote: cosmic-ray's, of every module of floor 0, against its own tests.

    pip install cosmic-ray
    cd tests && OMP_NUM_THREADS=1 python -m mutants.floor0 RESULTS           # all modules
    cd tests && OMP_NUM_THREADS=1 python -m mutants.floor0 RESULTS kl optim  # or some

So many of a module's mutants as `LAWS` says, drawn at random with a fixed seed, each planted in a
copy of the package. RESULTS is a folder with a line of JSON per trial. What lived on is tried again
by the next run, as a test may have been sharpened since, unless `survivors.md` has the line that it
makes of ours, and why that computes the same. A mutant that takes ten times as long as the tests
counts for neither side. Run it where nobody edits.

Left out because they would be killed for free: what is no Python, annotations, and operators that
no tensor of floats has (<<, ~, is).
"""

import ast
import hashlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutants.plant import OPTIONS, PACKAGE, READY, TESTS, _run, replace

SEED = 0
SLACK = 10  # a mutant may take so many times as long as the tests of the module itself
LAWS = {  # how many mutants are tried, and the tests of the module beside its cases of the contract
    "batch_advantages": (15, "batch_advantages"),
    "checks": (45, "checks ground misuse"),
    "direct": (25, "direct"),
    "distillation": (15, "distillation"),
    "distributions": (15, "distributions checks"),
    "fused": (15, "fused"),
    "groups": (60, "groups batch_advantages"),
    "kl": (100, "kl selection"),
    "linear": (15, "linear_logprobs linear_entropy"),
    "listwise": (15, "answers"),
    "logprobs": (45, "logprobs"),
    "mismatch": (15, "mismatch"),
    "moments": (15, "shaping"),
    "mpo": (15, "turns"),
    "offpolicy": (91, "surrogates"),
    "optim": (15, "optim"),
    "pairs": (15, "direct"),
    "policy": (45, "policy surrogates"),
    "preference": (25, "preference direct answers"),
    "random": (15, "random"),
    "reference_free": (15, "answers"),
    "references": (15, "distillation"),
    "returns": (25, "returns turns"),
    "rewards": (15, "rewards misuse"),
    "scan": (15, "ground"),
    "selection": (15, "selection"),
    "sequence": (25, "sequence"),
    "shaping": (15, "shaping"),
    "tree": (15, "ground optim"),
    "turns": (15, "turns"),
    "unpaired": (15, "answers direct"),
    "value": (25, "value distillation"),
    "verifiable": (15, "verifiable"),
    "weights": (25, "ground distillation sequence"),
}
OTHERS = r"_(RShift|LShift|BitXor|Pow|Mod|FloorDiv|Is|IsNot|UAdd|Invert)$"
BITWISE = r"ReplaceBinaryOperator_(?:(?!Bit)\w+_Bit|Bit\w+_(?!Bit))"
NOTHING_COLLECTED = 5  # of a module without cases of the contract
EXPLAINED = Path(__file__).parent / "survivors.md"


class Mutant(NamedTuple):
    """A module with one operator changed: in which function or class, which line, and to what."""

    owner: str
    ours: str
    theirs: str
    source: str

    @property
    def name(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


class Trial(NamedTuple):
    outcome: str  # killed, lived on, or ran out of time
    law: str
    seconds: float


def annotations(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where, (line, column), the annotations of a module reach."""
    nodes = list(ast.walk(tree))
    notes = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)) for x in notes if x]


def places(source: str) -> Iterator[tuple[str, int]]:
    """Every change that cosmic-ray knows of what is computed: an operator, and its how-manieth."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    notes, nodes = annotations(ast.parse(source)), list(ast_nodes(get_ast(source)))
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments() or re.search(OTHERS, name) or re.search(BITWISE, name):
            continue
        starts = (start for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, start in enumerate(starts):
            if not any(a <= start < b for a, b in notes):
                yield name, occurrence


def mutants(module: str) -> list[Mutant]:
    """All mutants of a module that are Python, in an order drawn at random."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / f"{module}.py").read_text()
    kinds = ast.FunctionDef | ast.ClassDef
    owners = [node for node in ast.parse(source).body if isinstance(node, kinds)]
    drawn, found = list(places(source)), []
    random.Random(SEED).shuffle(drawn)
    for name, occurrence in drawn:
        mutated = mutate_code(source, get_operator(name)(), occurrence)
        try:
            ast.parse(mutated)
        except SyntaxError:
            continue
        pairs = enumerate(zip(source.splitlines(), mutated.splitlines()), start=1)
        line, (ours, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        inside = [x.name for x in owners if x.lineno <= line <= x.end_lineno]
        found.append(Mutant("".join(inside), ours.strip(), theirs.strip(), mutated))
    return found


def selections(module: str) -> list[list[str]]:
    """What pytest is asked for: the files of a module, and then its cases of the contract."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    cases = " or ".join(f"[{x.name}" for x in tree.body if isinstance(x, ast.FunctionDef))
    files = [str(TESTS / f"test_{name}.py") for name in LAWS[module][1].split()]
    first = [*OPTIONS, "-x", "-m", "not slow and not compile"]
    return [[*first, *files], [*first, "-k", cases, str(TESTS / "test_contract.py")]]


def attempt(module: str, source: str, limit: float | None = None) -> Trial:
    """Run a module's tests on a copy of the package in which it reads `source`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        replace(PACKAGE, module, source, Path(place))
        for arguments in selections(module):
            paths = [place, str(TESTS.parent), str(TESTS)]
            process = READY.Process(target=_run, args=(arguments, paths, log))
            process.start()
            process.join(limit)
            late = process.is_alive()
            process.kill()
            process.join()
            seconds = round(time.monotonic() - start, 2)
            if late:
                return Trial("timed out", "", seconds)
            if process.exitcode not in (0, NOTHING_COLLECTED):
                text = log.read_text(errors="replace") if log.exists() else ""
                failed = re.search(r"^(?:FAILED|ERROR) (\S.*)$", text, re.M)
                law = failed[1][:200] if failed else f"exit {process.exitcode}"
                return Trial("killed", law, seconds)
    return Trial("lived", "", seconds)


def trials(module: str, chosen: list[Mutant], results: Path) -> dict[str, list[str]]:
    """The outcomes of each mutant, first to last; the new and the unexplained are tried now."""
    outcomes = {mutant.name: [] for mutant in chosen}
    if results.exists():
        for line in results.read_text().splitlines():
            outcomes.get(json.loads(line)["mutant"], []).append(json.loads(line)["outcome"])
    waiting = [
        mutant
        for mutant in chosen
        if not (past := outcomes[mutant.name])
        or past[-1] == "lived"
        and not explained(module, mutant)
    ]
    if not waiting:
        return outcomes
    source = (PACKAGE / f"{module}.py").read_text()
    whole, broken = attempt(module, source), attempt(module, f"{source}\nraise ImportError\n")
    if whole.outcome != "lived" or broken.outcome != "killed":
        raise RuntimeError(f"{module}: {whole} without a mutant, {broken} where it does not load")
    for mutant in waiting:
        trial = attempt(module, mutant.source, SLACK * whole.seconds)
        outcomes[mutant.name].append(trial.outcome)
        row = {"mutant": mutant.name, **mutant._asdict(), **trial._asdict()}
        del row["source"]
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return outcomes


def explained(module: str, mutant: Mutant) -> bool:
    """Whether `survivors.md` says why a mutant computes the same."""
    rows = EXPLAINED.read_text().replace("\\|", "|").splitlines()
    start = f"| {module} | {mutant.owner} | `{mutant.theirs}` |"
    return any(row.startswith(start) for row in rows)


def wilson(killed: int, tried: int, z: float = 1.96) -> str:
    """A share, and the interval that holds the true one in 95 of 100 samples (Wilson 1927)."""
    share, n = killed / tried, tried
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return f"{share:.1%} [{middle - half:.1%}, {middle + half:.1%}]"


def main(folder: str, *modules: str) -> None:
    from test_layout import FLOORS  # not above: it imports the package, and so would each process

    if untried := set(FLOORS[0].split()) - LAWS.keys():
        raise LookupError(f"LAWS has no line for {', '.join(sorted(untried))}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    names = "mutants, tried, killed at first, killed now, timed out, equivalent, unexplained"
    print("| module |", " | ".join(names.split(", ")), "|\n|" + "---|" * 8)
    totals = [0] * 7
    for module in modules or LAWS:
        found = mutants(module)
        chosen = found[: LAWS[module][0]]
        outcomes = trials(module, chosen, Path(folder) / f"{module}.jsonl")
        alive = [mutant for mutant in chosen if outcomes[mutant.name][-1] == "lived"]
        holes = [mutant for mutant in alive if not explained(module, mutant)]
        ends = [x[-1] for x in outcomes.values()]
        first = sum(x[0] == "killed" for x in outcomes.values())
        row = [len(found), len(chosen), first, ends.count("killed"), ends.count("timed out")]
        row += [len(alive) - len(holes), len(holes)]
        totals = [a + b for a, b in zip(totals, row)]
        print("|", " | ".join(map(str, (module, *row))), "|", flush=True)
        for hole in holes:
            print(f"    {hole.owner}\n    - {hole.ours}\n    + {hole.theirs}", flush=True)
    print("|", " | ".join(map(str, ("all", *totals))), "|\n")
    _, tried, first, killed, late, same, _ = totals
    could = tried - late - same
    print("killed of all tried:", wilson(killed, tried))
    print("of those that end and do not compute the same:", wilson(killed, could))
    print("of these at first, before tests were sharpened:", wilson(first, could))


if __name__ == "__main__":
    main(*sys.argv[1:])
