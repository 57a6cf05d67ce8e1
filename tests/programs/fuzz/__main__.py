"""Fuzz every reader of every kind of file, and every command line.

`python -m tests.programs.fuzz`, or `make fuzz MINUTES=30`.

Sound files are made by the tests' own helpers, changed by plans that hypothesis draws from a seed, and given to the
commands that read them. One holds when the command ends with 0 or 2 (`validate` and `own` also with 3), says a refusal
in one line, takes at most 60 s and 4 GB, ends by no signal and no traceback, leaves its input as it was, and lets no
hostile text onto a page. Cuts of files that say how long they are, and flipped bits of those with checksums, are
refused, or read to the same values as before. Prints what was tried and held of each kind; what fell is kept.

A campaign that its minutes end, or a person, goes on with the same command where --folder is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.programs.fuzz.campaign import Campaign, cases
from tests.programs.hostile_files import Tally, try_all


def main() -> int:
    """Run a campaign; 1 if anything fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=8, help="cases of each kind in a round (default: 8)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, each of another seed (default: 1)")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="kinds whose names hold one of these")
    parser.add_argument("--quick", action="store_true", help="without the commands that compile a model")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for what falls (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the campaign works and notes how far it is")
    parser.add_argument("--hostile-files", action="store_true", help="python -m tests.programs.hostile_files first")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.hostile_files:
            print(try_all(Path(folder)), flush=True)
        campaign = Campaign((arguments.folder or Path(folder)).resolve(), arguments.keep)
        try:
            whole = _rounds(campaign, arguments)
        finally:
            campaign.close()
    print(campaign.tally)
    for lines in campaign.tally.failed.values():
        print("\n".join(lines))
    if campaign.tally.failed:
        print(f"what fell is in {arguments.keep}, with the command in why.txt")
    print("done" if whole else "not done: time is up", file=sys.stderr)
    return int(bool(campaign.tally.failed))


def _rounds(campaign: Campaign, arguments: argparse.Namespace) -> bool:
    """Run the rounds from where they were left; whether that is all of them."""
    kind = "quick" if arguments.quick else "whole"
    name = f"{kind}.{arguments.each}.{arguments.seed}.{'_'.join(arguments.only)}.json"
    start, note = time.monotonic(), campaign.folder / name
    done = _load(note, campaign.tally)
    at = 0
    for number in range(arguments.seed, arguments.seed + arguments.rounds):
        for name, case in cases(campaign, arguments.each, number, arguments.only, not arguments.quick):
            at += 1
            if at <= done:
                continue
            if time.monotonic() - start > 60 * arguments.minutes:
                return False
            if said := case():
                print(f"fell: {name}: {said}", flush=True)
            if not at % 50:
                print(f"{at} cases, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            note.write_text(json.dumps([at, campaign.tally.tried, campaign.tally.failed]))
    return True


def _load(note: Path, tally: Tally) -> int:
    """How many cases are done, whose tally is taken up."""
    if not note.exists():
        return 0
    done, tally.tried, tally.failed = json.loads(note.read_text())
    return int(done)


if __name__ == "__main__":
    sys.exit(main())
