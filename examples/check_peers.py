"""The laws, put to the public functions of whichever other libraries are installed.

    python examples/check_peers.py

prints the table of PEERS.md. None of the libraries is needed; one that does not import is said not
to. What a finding means was judged by hand, beside the function in peer_functions.py; a finding
without a judgement is printed as "not judged".
"""

import warnings
from importlib.metadata import PackageNotFoundError, version

from peer_functions import LIBRARIES, Peer

from rlhf_fn.laws import Report, check


def row(peer: Peer, package: str, report: Report) -> str:
    """A line of the table."""
    asked = [v for v in report.verdicts if v.outcome != "not asked"]
    found = []
    for law, _, why, _ in report.broken:
        judged = (text for words, text in peer.judged.items() if words in law.name)
        found.append(f"*{law.name}*: {why}. **{next(judged, 'not judged')}**")
    cells = peer.name, peer.like, f"{len(asked) - len(found)} of {len(asked)}", "<br>".join(found)
    return "| " + " | ".join([package, *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print("| library | function | as | hold | what does not, and what that is |")
    print("|---|---|---|---|---|")
    for peers in LIBRARIES:
        name = peers.__name__
        try:
            package = f"{name} {version(name)}"
            for peer in peers():
                report = check(peer.function, like=peer.like, skip=peer.skip, **peer.settings)
                print(row(peer, package, report), flush=True)
        except PackageNotFoundError:
            print(f"| {name} | | | | not installed |")
        except ImportError as error:
            print(f"| {package} | | | | does not import here: {' '.join(str(error).split())} |")


if __name__ == "__main__":
    main()
