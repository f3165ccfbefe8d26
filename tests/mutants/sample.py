"""Which of cosmic-ray's mutants are tried: so many at random of those that change what is computed.

Annotations, and operators that no tensor of floats has (<<, ~, is, ...), would be killed for free.

    pip install cosmic-ray
    cosmic-ray init tests/mutants/cosmic_ray.toml /tmp/kl.sqlite
    python tests/mutants/sample.py /tmp/kl.sqlite 100
    cosmic-ray exec tests/mutants/cosmic_ray.toml /tmp/kl.sqlite && cr-report /tmp/kl.sqlite
"""

import ast
import random
import re
import sys
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

OTHERS = r"_(RShift|LShift|BitXor|Pow|Mod|FloorDiv|Is|IsNot|UAdd|Invert)$"
BITWISE = r"ReplaceBinaryOperator_(?:(?!Bit)\w+_Bit|Bit\w+_(?!Bit))"


def annotations(path: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where, (line, column), the annotations of a module reach."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    notes = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)) for x in notes if x]


def main(session: str, number: str = "100", seed: str = "0") -> None:
    with use_db(session, WorkDB.Mode.open) as db:
        kept = []
        for item in db.pending_work_items:
            (mutation,) = item.mutations
            name = mutation.operator_name
            notes = annotations(str(mutation.module_path))
            hidden = any(start <= mutation.start_pos < end for start, end in notes)
            if hidden or re.search(OTHERS, name) or re.search(BITWISE, name):
                db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
            else:
                kept.append((name, mutation.occurrence, item.job_id))
        kept.sort()
        random.Random(int(seed)).shuffle(kept)
        for *_, job in kept[int(number) :]:
            db.set_result(job, WorkResult(WorkerOutcome.SKIPPED))
        print(f"{len(kept)} mutants, {min(len(kept), int(number))} of them to be tried")


if __name__ == "__main__":
    main(*sys.argv[1:])
