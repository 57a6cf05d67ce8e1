"""Read, write, annotate, verify and describe explicit-reasoning targets.

    python -m data_pipelines.av_uie read     --root R --labels ave_converted_label.zip --out R/released.jsonl
    python -m data_pipelines.av_uie write    --root R --datasets avqa,arig --out R/written.jsonl
    python -m data_pipelines.av_uie annotate --root R --datasets ave --url https://host/v1 --model M --out R/llm.jsonl
    python -m data_pipelines.av_uie verify   --examples R/written.jsonl --out R/checked
    python -m data_pipelines.av_uie card     --examples R/checked/good.jsonl --out R/card

Plain labels come from a data root of original releases (--root, --datasets, --split) or from a JSONL file of Examples
(--examples). `<command> --help` says more; docs/av_uie.md is the guide.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Name, Real, Whole
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import out_file, out_folder, write_whole
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.io.structured import read_text, strict_json
from crab_jax.reports import review_page
from crab_jax.tasks import TASKS
from data_pipelines import datasets
from data_pipelines.av_uie import annotate, card, labels, released, templates, verify
from data_pipelines.examples import Example, read_jsonl, select, write_jsonl
from data_pipelines.tokens import Tokenizer

_READ = """Write Examples whose targets are the released labels of AV-UIE, matched by video or question.

    python -m data_pipelines.av_uie read --root R --labels zips/ave_converted_label.zip \\
        --labels avvp=LLP/converted_label --out R/released.jsonl

A label file is a released zip or the folder of an unpacked one. <out>.report.json lists the Examples without a label
and the labels without an Example.
"""
_WRITE = """Write Examples whose targets follow from their labels, masks and questions by templates.

    python -m data_pipelines.av_uie write --root R --split train --out R/written.jsonl
"""
_ANNOTATE = """Write Examples whose targets an LLM writes from the facts of their labels.

    export AV_UIE_API_KEY=...
    python -m data_pipelines.av_uie annotate --root R --datasets ave,avqa --url https://host/v1 --model M --estimate
    python -m data_pipelines.av_uie annotate --root R --datasets ave,avqa --url https://host/v1 --model M \\
        --price-in 0.15 --price-out 0.60 --budget 20 --out R/llm.jsonl

Answers are kept in <out>.journal; the same command continues a stopped run and repeats no request. Ctrl-C waits for
pending requests.
"""
_VERIFY = """Compare targets with their labels: DIR gets good.jsonl, quarantine.jsonl, verify.json and review.html.

    python -m data_pipelines.av_uie verify --examples R/llm.jsonl --out R/checked
    python -m data_pipelines.av_uie verify --examples R/llm.jsonl --out R/checked --accept ids.txt --reject other.txt
"""
_CARD = """Describe a set of Examples: DIR gets card.json and card.md.

    python -m data_pipelines.av_uie card --examples R/checked/good.jsonl --tokenizer LLaMA --out R/card
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m data_pipelines.av_uie`."""
    argv = sys.argv[1:] if argv is None else argv
    run_verb(lambda: _run(argv), "--debug" in argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.out:  # checked before the work, not after it
        (out_folder if args.command in (_verify, _card) else out_file)(args.out)
    args.command(args)


def _parser() -> CommandLine:
    parser = CommandLine(__doc__, "python -m data_pipelines.av_uie")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, doc: str, command: Any, out: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=doc.splitlines()[0], doc=doc)
        subparser.add_argument("--out", type=ANYWHERE, required=name != "annotate", help=out)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(command=command)
        return subparser

    read = add("read", _READ, _read, "JSONL file to write")
    read.add_argument(
        "--labels",
        action="append",
        type=_labels_at,
        required=True,
        metavar="[NAME=]PATH",
        help=f"released zip or unpacked folder, of {', '.join(released.ZIPS)}; may be repeated",
    )
    read.add_argument("--skip-bad", action="store_true", help="leave out damaged label files instead of stopping")
    write = add("write", _WRITE, _write, "JSONL file to write")
    llm = add("annotate", _ANNOTATE, _annotate, "JSONL file to write")
    for one in (read, write, llm):
        _plain_labels(one)
    _endpoint_arguments(llm)
    check = add("verify", _VERIFY, _verify, "folder to write")
    check.add_argument(
        "--examples", type=ANYWHERE, required=True, metavar="FILE", help="JSONL of Examples with targets"
    )
    check.add_argument(
        "--root", type=ANYWHERE, metavar="DIR", help="where media and masks are (default: the folder of --examples)"
    )
    check.add_argument("--accept", type=ANYWHERE, metavar="FILE", help="ids, one per line, that a person approved")
    check.add_argument("--reject", type=ANYWHERE, metavar="FILE", help="ids, one per line, that a person rejected")
    check.add_argument(
        "--sample", type=Whole(1), default=5, help="number of good Examples per task on the page (default: 5)"
    )
    describe = add("card", _CARD, _card, "folder to write")
    describe.add_argument(
        "--examples", type=ANYWHERE, required=True, nargs="+", metavar="FILE", help="JSONL of Examples"
    )
    describe.add_argument(
        "--tokenizer", type=ANYWHERE, metavar="PATH", help="tokenizer.json or folder, to count tokens too"
    )
    describe.add_argument("--name", default="AV-UIE", help="title of the card")
    return parser


def _labels_at(text: str) -> str:
    """Check the path of `[NAME=]PATH`. For argparse."""
    ANYWHERE(text.rpartition("=")[2])
    return text


def _plain_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        type=ANYWHERE,
        metavar="DIR",
        help="data root of original releases; or where the media of --examples are (default: its folder)",
    )
    parser.add_argument("--datasets", default="", metavar="A,B", help="datasets of the root (default: all that exist)")
    parser.add_argument("--split", type=Name(), default="train")
    parser.add_argument(
        "--missing",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about missing media files (default: raise)",
    )
    parser.add_argument(
        "--malformed",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about rows that cannot be read (default: raise)",
    )
    parser.add_argument("--examples", type=ANYWHERE, metavar="FILE", help="a JSONL file of Examples instead")
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"of {','.join(TASKS)} (default: all)")
    parser.add_argument("--limit", type=Whole(1), help="number of Examples per task, from the first")


def _endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    environment = os.environ.get
    parser.add_argument(
        "--url", default=environment("AV_UIE_BASE_URL", ""), help="the endpoint up to /v1 (default: AV_UIE_BASE_URL)"
    )
    parser.add_argument("--model", default=environment("AV_UIE_MODEL", ""), help="(default: AV_UIE_MODEL)")
    parser.add_argument(
        "--key-env",
        default="AV_UIE_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key; unset for a server without one (default: AV_UIE_API_KEY)",
    )
    parser.add_argument(
        "--parameters",
        type=strict_json,
        default=annotate.PARAMETERS,
        metavar="JSON",
        help=f"parameters of the request (default: {json.dumps(annotate.PARAMETERS)})",
    )
    parser.add_argument("--journal", type=ANYWHERE, metavar="FILE", help="answers received (default: <out>.journal)")
    parser.add_argument("--workers", type=Whole(1), default=8, help="concurrent requests (default: 8)")
    parser.add_argument(
        "--rpm", type=Real(1e-3, 1e9, zero=True), default=0.0, help="requests per minute (default: no limit)"
    )
    parser.add_argument("--timeout", type=Real(1e-3, 1e6), default=120.0, help="seconds for one reply (default: 120)")
    parser.add_argument("--attempts", type=Whole(1), default=6, help="tries of one request (default: 6)")
    parser.add_argument(
        "--backoff", type=Real(0, 1e6), default=1.0, help="seconds before a second try; doubles (default: 1)"
    )
    parser.add_argument(
        "--corrections",
        type=Whole(0, 3),
        default=1,
        help="how often a target that disagrees is requested again (default: 1)",
    )
    parser.add_argument("--price-in", type=Real(), default=0.0, help="price of a million prompt tokens")
    parser.add_argument("--price-out", type=Real(), default=0.0, help="price of a million answer tokens")
    parser.add_argument("--budget", type=Real(), default=0.0, help="largest cost of all answers (default: no limit)")
    parser.add_argument("--no-masks", action="store_true", help="do not read masks; targets then mention no places")
    parser.add_argument(
        "--estimate", action="store_true", help="print requests, tokens and cost without sending any request"
    )


# Input and output


def _examples(args: argparse.Namespace) -> tuple[list[Example], Path]:
    """Return the Examples with plain labels that the arguments name, and the root of their media. Raises InputError."""
    if bool(args.examples) == bool(args.datasets or not args.examples and args.root):
        raise InputError(
            "command line",
            "",
            "give plain labels once",
            "give --root (and --datasets) for original releases, or --examples for a JSONL file",
        )
    if args.examples:
        root, examples = paths.at(args.root or paths.at(args.examples).parent), read_jsonl(args.examples)
    else:
        root, examples = paths.at(args.root), []
        for name in datasets.choose(args.root, [n for n in args.datasets.split(",") if n], args.split):
            on_stderr(f"reading {name} {args.split}")
            examples += datasets.read(args.root, name, args.split, "train", args.missing, args.malformed)
    return select(examples, [task for task in args.tasks.split(",") if task], args.limit), root


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


# The commands


def _read(args: argparse.Namespace) -> None:
    examples, _ = _examples(args)
    attached: list[Example] = []
    report: dict[str, Any] = {}
    for argument in args.labels:
        name, _, path = argument.rpartition("=")
        found = released.read(path, name, strict=not args.skip_bad)
        result = released.attach(examples, found)
        if not result.examples:
            asked = next((e.id for e in examples if e.task in released.ZIPS[found.name]), "none of its task")
            problem = (
                f"none of its {len(found.texts)} labels (such as {min(found.texts)!r}) belongs to an example "
                f"(such as {asked!r})"
            )
            raise InputError(path, "", problem, "check --datasets, --split and --examples")
        attached += result.examples
        report[found.name] = {
            "labels": len(found.texts),
            "examples": len(result.examples),
            "bad": found.problems,
            "examples_without": result.without,
            "labels_unused": result.unused,
        }
        print(
            f"{found.name}: {len(result.examples)} targets from {len(found.texts)} labels; {len(result.without)} "
            f"examples have none, {len(result.unused)} labels are not used, {len(found.problems)} are bad"
        )
    write_jsonl(args.out, attached)
    write_whole(f"{args.out}.report.json", _as_json(report))


def _write(args: argparse.Namespace) -> None:
    examples, root = _examples(args)
    usable = [example for example in examples if not labels.weak(example)]
    progress = Progress("written", len(usable))
    write_jsonl(args.out, [templates.write(example, root) for example in progress.over(usable)])
    print(f"{len(usable)} targets written, {len(examples) - len(usable)} left out (labels without times or names)")


def _annotate(args: argparse.Namespace) -> None:
    examples, data_root = _examples(args)
    root = None if args.no_masks else data_root
    if not isinstance(args.parameters, dict):
        raise InputError("--parameters", "", "is no JSON object", 'give it as {"temperature": 0.3}')
    endpoint = annotate.Endpoint(
        url=args.url,
        model=args.model,
        key=os.environ.get(args.key_env, ""),
        parameters=args.parameters,
        timeout=args.timeout,
        attempts=args.attempts,
        backoff=args.backoff,
        per_minute=args.rpm,
        price_in=args.price_in,
        price_out=args.price_out,
        budget=args.budget,
    )
    if args.estimate:
        print(_as_json(annotate.estimate(examples, endpoint, root)), end="")
        return
    if not args.out:
        raise InputError("command line", "", "--out is missing", "say where the Examples go, or use --estimate")
    journal = annotate.Journal(args.journal or f"{args.out}.journal")
    client = annotate.Client(endpoint, journal)
    progress = Progress("annotated", sum(map(annotate.asked_about, examples)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM stops as cleanly as ctrl-C
    try:
        outcome = annotate.run(
            examples,
            client,
            root,
            args.corrections,
            args.workers,
            lambda done: progress.to(done, f"  {_costs(client)}"),
            lambda: on_stderr("stopping: waiting for the requests under way; ctrl-C again drops them"),
        )
    finally:
        print(_costs(client))
        journal.close()
    write_jsonl(args.out, outcome.examples)
    left = sum(not annotate.asked_about(example) for example in examples)
    print(f"{len(outcome.examples)} targets, {left} examples left out (captions, labels without times or names)")
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        problem = f"{len(outcome.failed)} examples have no answer, the first {first!r}: {why}"
        raise InputError("the endpoint", "", problem, "run the same command again; what was answered is kept")


def _costs(client: annotate.Client) -> str:
    """Format the number of requests and their cost: of this run, and of the whole journal."""
    counts, journal = client.counts, client.journal
    return (
        f"{counts['asked']} asked, {counts['cached']} from the journal, {counts['retried']} retried; in all "
        f"{journal.tokens_in} + {journal.tokens_out} tokens, cost {client.spent():.4f}, {journal.lost} lost"
    )


def _verify(args: argparse.Namespace) -> None:
    examples, out = read_jsonl(args.examples), paths.at(args.out)
    root = paths.at(args.root or paths.at(args.examples).parent)
    accept, reject = (_ids(path, examples) for path in (args.accept, args.reject))
    if both := accept & reject:
        raise InputError("--reject", "", f"{min(both)!r} is accepted too", "keep it in one of the two files")
    progress = Progress("verified", len(examples))
    good, bad = verify.split(examples, root, accept, reject, progress.to)
    write_jsonl(out / "good.jsonl", good)
    write_jsonl(out / "quarantine.jsonl", [example for example, _ in bad])
    write_whole(out / "verify.json", _as_json({"good": len(good), **verify.counted(bad)}))
    write_whole(out / "review.html", review_page.page(good, bad, root, args.sample))
    print(f"{len(good)} good, {len(bad)} in quarantine; look at {out / 'review.html'}")


def _ids(path: str | None, examples: Sequence[Example]) -> set[str]:
    """Return the ids in a file of decisions. Raises InputError."""
    if path is None:
        return set()
    lines = read_text(path).splitlines()
    ids = {line.strip() for line in lines if line.strip()}
    shown = {printable(example.id): example.id for example in examples}  # the review page shows printable ids
    ids = {shown.get(name, name) for name in ids}
    if unknown := ids - {example.id for example in examples}:
        raise InputError(path, "", f"{min(unknown)!r} is the id of no example", "copy the ids from the review page")
    return ids


def _card(args: argparse.Namespace) -> None:
    examples = [example for path in args.examples for example in read_jsonl(path)]
    if not examples:
        raise InputError(args.examples[0], "", "holds no examples", "give a file that does")
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    found = card.card(examples, (lambda text: len(tokenizer.ids(text))) if tokenizer else None)
    page = card.markdown(found, args.name)
    write_whole(paths.at(args.out) / "card.json", _as_json(found))
    write_whole(paths.at(args.out) / "card.md", page)
    print(page, end="")


if __name__ == "__main__":
    main()
