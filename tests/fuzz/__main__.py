"""Fuzz every reader of every kind of file, and every command line: `python -m tests.fuzz`, or `make fuzz MINUTES=30`.

Sound files are made by the tests' own helpers, changed by plans that hypothesis draws from a seed, and given to the
commands that read them. One holds when the command ends with 0 or 2 (`validate` and `own` also with 3), says a refusal
in one line, takes at most 60 s and 4 GB, ends by no signal and no traceback, leaves its input as it was, and lets no
hostile text onto a page. Cuts of files that say how long they are, and flipped bits of those with checksums, are
refused, or read to the same values as before. Prints what was tried and held of each kind; what fell is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import Campaign, cases
from tests.hostile_files import try_all


def main() -> int:
    """Run a campaign; 1 if anything fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="cases of each kind (default: 20)")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with other seeds for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="kinds whose names hold one of these")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for what falls (%(default)s)")
    parser.add_argument("--hostile-files", action="store_true", help="python -m tests.hostile_files first")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    start, fallen = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.hostile_files:
            print(try_all(Path(folder)), flush=True)
        campaign = Campaign(Path(folder).resolve() / "fuzz", arguments.keep)
        try:
            number = arguments.seed
            while number == arguments.seed or time.monotonic() - start < 60 * arguments.minutes:
                for name, case in cases(campaign, arguments.each, number, arguments.only):
                    if said := case():
                        fallen += 1
                        print(f"fell: {name}: {said}", flush=True)
                    if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
                        break
                tried = sum(campaign.tally.tried.values())
                print(f"seed {number}: {tried} tried, {fallen} fell, {time.monotonic() - start:.0f} s", file=sys.stderr,
                      flush=True)
                number += 1
        finally:
            campaign.close()
    print(campaign.tally)
    for lines in campaign.tally.failed.values():
        print("\n".join(lines))
    if fallen:
        print(f"what fell is in {arguments.keep}, with the command in why.txt")
    return int(fallen > 0)


if __name__ == "__main__":
    sys.exit(main())
