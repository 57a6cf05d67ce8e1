"""Check, prepare, import and inspect the data of a data root.

    python -m data_pipelines status --root R [--datasets a,b] [--json FILE]      have / missing / corrupt / effective N
    python -m data_pipelines validate --root R [--datasets a,b] [--json FILE]    decodes everything; exits 3 if bad
    python -m data_pipelines prepare --root R --out DIR [--datasets a,b]            decodes once, for train and evaluate
    python -m data_pipelines index --root R [--datasets a,b]                       reads all annotations once, for train
    python -m data_pipelines plan --root R --batch-size B --step-seconds S         how many workers a host needs
    python -m data_pipelines own --csv FILE --root R                               your own table as Examples, validated
    python -m data_pipelines sample --root R --out DIR [--datasets a,b] [--n N]      a page of records to look at

`python -m data_pipelines <verb> --help` says more.
"""

from __future__ import annotations

import importlib
import sys

from crab_jax.io.errors import InputError, run_verb

# verb -> the module with its main(argv)
VERBS = {
    "status": "data_pipelines.status",
    "validate": "data_pipelines.validate",
    "prepare": "data_pipelines.prepare",
    "index": "data_pipelines.index",
    "plan": "data_pipelines.plan",
    "own": "data_pipelines.own.verb",
    "sample": "crab_jax.reports.record_page",
}


def main(argv: list[str]) -> None:
    """Run one verb."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in VERBS:
        raise InputError("command line", "", f"unknown verb {argv[0]!r}", f"use one of {', '.join(VERBS)}")
    else:
        importlib.import_module(VERBS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    run_verb(lambda: main(sys.argv[1:]))
