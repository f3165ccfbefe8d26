"""A table of every bug, the law that caught it, and how that said so."""

import sys
import tempfile
from pathlib import Path

from mutants.catalogue import ELSEWHERE, MUTANTS
from mutants.plant import Verdict, replay

wanted = sys.argv[1:]  # rows, or none for all
print("| row | bug | seen in | planted in | caught by | how |")
print("|---|---|---|---|---|---|")
missed = 0
for mutant in MUTANTS:
    if not wanted or mutant.row in wanted:
        try:
            with tempfile.TemporaryDirectory() as folder:
                verdict = replay(mutant, Path(folder))
        except LookupError as error:
            verdict = Verdict("the source has changed", str(error), "")
        missed += not verdict.caught
        law, how = (verdict.law, verdict.how[:60]) if verdict.law else ("**nothing**", "")
        how = how.replace("|", "\\|") if verdict.caught else f"**no assertion** {how}"
        row = (mutant.row, mutant.bug, mutant.seen, mutant.module, law, how)
        print("|", " | ".join(row), "|", flush=True)
for row, why in ELSEWHERE.items():
    if not wanted or row in wanted:
        print(f"| {row} | {why} | | | | |")
sys.exit(missed)
