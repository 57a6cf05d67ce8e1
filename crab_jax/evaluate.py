"""Answer a split with a trained model and score it, or score answers that exist.

    python -m crab_jax.evaluate --checkpoint runs/x --tasks ave,s4 --split test --out runs/x/test
    python -m crab_jax.evaluate --predictions infer_results.jsonl --tasks avqa --data DIR --out scored

Writes predictions.jsonl and masks/*.png into --out as answers are generated, then results.json, results.md and
results.html. The same command resumes a run that was stopped. Decoding is greedy, so that two runs agree. With
--predictions no model is needed: the file was written by this program or by the released code, and docs/evaluation.md
has its schema. Several processes share the work with --process I/N each, or when they are started as one JAX run (see
crab_jax/parallel/distributed.py); process 0 waits for the others and scores their answers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from crab_jax.aot import compile_cache
from crab_jax.api import load
from crab_jax.checkpoints.stored import identity
from crab_jax.config import RunConfig
from crab_jax.evaluation import predictions, scoring
from crab_jax.evaluation.judging import DESCRIPTION, check_labels, judge_folder, read_predictions
from crab_jax.evaluation.scoring import Judged
from crab_jax.inference import Prediction, read_answer
from crab_jax.io import locks, paths
from crab_jax.io.bounds import ANY_PATH, ANY_PLACE, ANYWHERE, Anything, Name, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_folder, set_aside, write_whole
from crab_jax.io.progress import Progress
from crab_jax.io.structured import read_json
from crab_jax.models.generating import KINDS
from crab_jax.parallel import distributed
from crab_jax.reports import evaluation_page
from crab_jax.runs import run_data, run_folder, run_mesh
from crab_jax.tasks import TASKS, add_flag
from crab_jax.tasks.task import sample_score
from crab_jax.visualize.page import NONE, Html
from data_pipelines.datasets import VARIANTS
from data_pipelines.decoded import mask_size
from data_pipelines.examples import Example, digest, select
from data_pipelines.tokens import Tokenizer

PATIENCE = 1800  # seconds without a new answer after which process 0 no longer waits for the others


# The identity of an evaluation folder.


def fingerprint(params: Any) -> str:
    """Return a digest of parameters: names, shapes, dtypes and up to 8191 evenly spaced values of every leaf."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ):
        flat = np.asarray(leaf).reshape(-1)
        digest.update(f"{path}{leaf.shape}{flat.dtype}".encode() + flat[:: max(1, flat.size // 4096)].tobytes())
    return digest.hexdigest()


# Fields of a run's DataConfig that no answer depends on: `lengths` affect padding, the others concern training.
NO_ANSWER = ("lengths", "prompt_only", "on_error", "cache_dir", "tasks")
# Fields of the model's config, by module, that no answer depends on: they concern training, or give the same numbers.
NO_ANSWER_SIZES = {"llama": ("remat", "attention"), "lora": ("dropout", "dropout_bits")}
FIRST = {"examples"}  # names in the identity of every evaluation folder, whatever version wrote it


def settings(arguments: argparse.Namespace, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return by name the settings that answers depend on, besides the parameters and the questions.

    They are the config of the model (its heads, scales and dtypes do not show in the shapes of parameters), how media
    become arrays (such as the clock), the tokenizer, and the decoding options. Batch size, mesh and device are left
    out, because they change only the last bits of numbers. So are the contents of media files, which are not hashed.
    """
    data = dataclasses.asdict(
        dataclasses.replace(config.data, mute_audio=arguments.mute_audio, blank_video=arguments.blank_video)
    )
    kept = {name: value for name, value in data.items() if name not in NO_ANSWER}
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "force_masks": arguments.force_masks,
        "weights": arguments.weights,
        "tokenizer": tokenizer.digest(),
        **kept,
        "model": _answering(json.loads(json.dumps(dataclasses.asdict(config.model)))),
    }


def _answering(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a model's config that answers depend on; older versions noted all."""

    def kept(module: str, fields: Any) -> Any:
        left_out = NO_ANSWER_SIZES.get(module, ())
        return {name: value for name, value in fields.items() if name not in left_out} if left_out else fields

    return {module: kept(module, fields) for module, fields in model.items()}


def describe(
    arguments: argparse.Namespace,
    root: Path,
    split: Sequence[Example],
    origin: Mapping[str, str],
    content: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of `evaluation.json`: the source of the answers, the data, and the identity.

    The identity is `content`, all that the answers depend on, with a digest of the split.
    """
    return {**origin, "data": str(root), "split": arguments.split, "identity": {**content, "examples": digest(split)}}


def claim(out: Path, description: Mapping[str, Any], first: bool) -> None:
    """Make `out` the folder of this evaluation, and move the answers of a different evaluation to `previous/`.

    Only the `first` process does so, and the others wait for it.
    """
    file = out / DESCRIPTION
    identity = description["identity"]

    def noted() -> dict[str, Any]:
        try:
            known = dict(read_json(file, {"identity": Anything()})["identity"])
            return known | ({"model": _answering(known["model"])} if "model" in known else {})
        except (InputError, TypeError, ValueError, AttributeError):
            return {}

    if not first:
        _wait_for(lambda: noted() == identity, bool, f"{file} of process 0")
        return
    before = noted()
    changed = [name for name, value in before.items() if identity.get(name, ...) != value]
    unknown = [name for name in identity if name not in before]
    if not changed and FIRST.issubset(before):
        if unknown:
            print(
                f"{file} is of an older version, which did not note {', '.join(unknown)}: assumed to be the same",
                flush=True,
            )
    else:
        old = [path for path in (*predictions.parts(out), out / "masks", file) if path.exists()]
        moved = out / ".previous"  # renamed when complete; if the process is killed before, the next one finishes it
        if old or moved.exists():
            print(
                f"answers of another model, split or setting are moved to {out / 'previous'}; what differs: "
                f"{', '.join(changed) or 'not known'}",
                flush=True,
            )
            set_aside(old, moved, out / "previous")
    write_whole(file, json.dumps(description, indent=1).encode())


def _wait_for(look: Callable[[], Any], enough: Callable[[Any], bool], what: str) -> None:
    """Call `look` every second until its result is `enough`.

    Raises InputError, which names `what` was awaited, when the result has not changed for PATIENCE seconds.
    """
    last, since = look(), time.monotonic()
    while not enough(last):
        time.sleep(1)
        now = look()
        if now != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise InputError(
                "--process",
                "",
                f"waited {PATIENCE} s for {what}",
                "start the missing processes again, then this one: each continues where it stopped",
            )


# Answers.


def share(examples: Sequence[Example], index: int, count: int) -> list[Example]:
    """Return the examples that process `index` of `count` answers: every count-th."""
    return list(examples[index::count])


class Source(NamedTuple):
    """A source of answers: a model or a file.

    root: data root. split: all Examples of the split. examples: those to score. description: contents of
    `evaluation.json`. answerable: ids of the Examples that it can answer. answers: yields the answers to Examples.
    """

    root: Path
    split: list[Example]
    examples: list[Example]
    description: dict[str, Any]
    answerable: set[str]
    answers: Callable[[list[Example]], Iterator[Prediction]]


def _read_split(arguments: argparse.Namespace) -> tuple[Path, list[Example], list[Example]]:
    """Return the data root, all Examples of the split, and those to score.

    Raises InputError for data that cannot be read or scored.
    """
    if arguments.predictions and not arguments.data:
        raise InputError("--data", "", "is not given", "--predictions are scored against the labels of --data=DIR")
    root = (
        paths.at(arguments.data)
        if arguments.predictions
        else run_data.data_root(arguments.data, run_folder.load_config(arguments.checkpoint))
    )
    split = run_data.read_examples(
        root,
        arguments.split,
        datasets=[name for name in arguments.datasets.split(",") if name],
        variant=arguments.variant,
        missing=arguments.missing,
        malformed=arguments.malformed,
    )
    examples = select(split, [task for task in arguments.tasks.split(",") if task], arguments.limit)
    check_labels(examples)
    return root, split, examples


def from_model(arguments: argparse.Namespace, root: Path, split: list[Example], examples: list[Example]) -> Source:
    """Return the source that answers with the model of --checkpoint."""
    rows = arguments.batch_size or run_mesh.answered_rows(
        run_folder.load_config(arguments.checkpoint), arguments.weights, arguments.max_new_tokens, arguments.tensor
    )
    crab = load(arguments.checkpoint, arguments.weights, batch_size=rows, tensor=arguments.tensor)
    if crab.mesh is not None and crab.mesh.size > 1:
        print(f"{crab.mesh.shape['data']} copies of the model on {crab.mesh.size} devices", flush=True)

    def answers(todo: list[Example]) -> Iterator[Prediction]:
        return crab.predict(
            todo,
            root,
            batch_size=rows,
            max_new_tokens=arguments.max_new_tokens,
            decoding={"force_masks": arguments.force_masks},
            cache_dir=arguments.cache_dir,
            mute_audio=arguments.mute_audio,
            blank_video=arguments.blank_video,
        )

    content = {"parameters": fingerprint(crab.params), **settings(arguments, crab.config, crab.tokenizer)}
    description = describe(arguments, root, split, {"checkpoint": arguments.checkpoint}, content)
    return Source(root, split, examples, description, {example.id for example in examples}, answers)


def from_file(arguments: argparse.Namespace, root: Path, split: list[Example], examples: list[Example]) -> Source:
    """Return the source that takes answers from the file --predictions.

    Raises InputError for a file without answers to these examples.
    """
    file = paths.at(arguments.predictions)
    tasks, wanted = {example.task for example in examples}, {example.id for example in examples}
    of_tasks = [example for example in split if example.task in tasks]
    others = {example.id for example in split if example.task not in tasks}
    lines = predictions.read_rows(file)
    assigned = predictions.assign(lines, of_tasks, str(file), others)
    if not assigned:
        raise InputError(str(file), "predictions", "has no line about these examples", "give the file of their answers")
    rows = {name: row for name, row in assigned.items() if name in wanted}  # --limit may leave out some of the file
    print(
        f"{len(rows)} of {len(examples)} examples have a prediction"
        + ("" if len(rows) == len(examples) else "; the others count as answered with nothing"),
        flush=True,
    )

    levels = predictions.MaskLevels(
        assigned, {example.id for example in of_tasks if example.mask_kind == "binary"}, file.parent
    )
    for note in levels.notes:
        print(f"{file}: {note}", flush=True)

    def answers(todo: list[Example]) -> Iterator[Prediction]:
        for example in todo:
            row, line = rows[example.id], f"{file}, {example.id}"
            answer = predictions.answer_of(
                row,
                example,
                file.parent,
                line,
                levels.of(example.id, row, line),
                functools.partial(mask_size, root, example),
            )
            yield read_answer(example, answer.text, answer.mask)

    content = {
        "predictions": hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(),
        "masks": predictions.masks_digest(lines, file.parent),
    }
    description = describe(arguments, root, split, {"predictions": str(file)}, content)
    return Source(root, split, examples, description, set(rows), answers)


def collect(source: Source, out: Path, index: int, count: int) -> None:
    """Write the missing answers of this process's share; process 0 then waits for the others and merges all answers."""
    assigned = [example for example in share(source.examples, index, count) if example.id in source.answerable]
    known = predictions.read_all(out)
    todo = [example for example in assigned if example.id not in known]
    if len(todo) < len(assigned):
        print(f"{len(assigned) - len(todo)} of {len(assigned)} examples are answered already", flush=True)
    if todo:
        file = out / (predictions.FILE if count == 1 else f"predictions.{index}.jsonl")
        progress = Progress("examples", len(assigned), done=len(assigned) - len(todo))
        for _ in progress.over(predictions.append(file, source.answers(todo))):
            pass
    if index:
        print(f"process {index} has answered its {len(assigned)} examples; process 0 scores them")
        return
    _wait_for(
        lambda: predictions.read_all(out).keys(), source.answerable.issubset, "the answers of the other processes"
    )
    predictions.merge(out, [example.id for example in source.split])


def shown_examples(
    judged: Sequence[Judged], folder: Path, examples: Sequence[Example], root: Path, count: int, clock: str
) -> Iterator[tuple[str, Html]]:
    """Yield (heading, HTML) of the worst and the best `count` samples of each task.

    Frames are chosen by `clock`, that of the model (data_pipelines/media/clock.py).
    """
    by_id, rows = {example.id: example for example in examples}, predictions.read_all(folder)
    for task, of_task in scoring.by_task(judged).items():
        values = {answer.id: sample_score(TASKS[task], answer.stats) for answer in of_task}
        for heading, ids in zip(("worst", "best"), evaluation_page.extremes(values, count), strict=True):
            answers = read_predictions(folder, rows, [by_id[name] for name in ids])
            drawn = (evaluation_page.drawn(answer, values[answer.example.id], root, clock) for answer in answers)
            yield f"{task}, {heading}", NONE.join(drawn)


def report_scores(arguments: argparse.Namespace, out: Path, root: Path, examples: Sequence[Example]) -> None:
    """Score the answers in `out`, write results.json, results.md and results.html there, and print the headlines."""
    judged = judge_folder(out, examples, root)
    results: dict[str, Any] = scoring.summarise(judged)
    metas = {example.id: example.meta for example in examples}
    breakdowns = {
        name: TASKS[name].breakdown([answer.stats for answer in of_task], [metas[answer.id] for answer in of_task])
        for name, of_task in scoring.by_task(judged).items()
    }
    results["breakdown"] = {
        name: {key: {"value": value, "n": n} for key, (value, n) in parts.items()}
        for name, parts in breakdowns.items()
        if parts
    }
    write_whole(out / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
    write_whole(out / "results.md", scoring.markdown(results))
    made = run_folder.load_config(arguments.checkpoint) if arguments.checkpoint and arguments.examples else None
    clock = made.data.clock if made else "shown"
    shown = shown_examples(judged, out, examples, root, arguments.examples, clock)
    title = f"Evaluation of {paths.absolute(arguments.predictions or arguments.checkpoint).name}"
    evaluation_page.write(out / "results.html", title, results, breakdowns, shown if arguments.examples else ())
    print(scoring.headlines(results))
    print(f"every metric: {out / 'results.md'}\npage: {out / 'results.html'}")


def use_of(arguments: argparse.Namespace, count: int, root: Path, split: Sequence[Example]) -> dict[str, Any]:
    """Return by name what the processes of one evaluation must have in common, nothing for a single process."""
    if count == 1:
        return {}
    own = ("out", "data", "process", "examples", "batch_size", "tensor", "cache_dir", "debug", "checkpoint")
    same = {f"--{name.replace('_', '-')}": value for name, value in vars(arguments).items() if name not in own}
    if arguments.checkpoint:
        same["--checkpoint"] = f"a checkpoint with hash {identity(arguments.checkpoint)}"
    return {
        "processes": count,
        **same,
        **distributed.program(),
        "examples of --data": digest(split),
        "media of --data": run_data.media_identity(root, arguments.split, split),
    }


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the whole evaluation that the command line describes."""
    out_folder(arguments.out)
    alone = arguments.predictions or arguments.process
    with contextlib.nullcontext() if alone else distributed.together(arguments.debug):
        index, count = arguments.process or (jax.process_index(), jax.process_count())
        read = _read_split(arguments)  # so that a wrong --data is reported before a model is loaded
        use = use_of(arguments, count, *read[:2])
        with locks.locked(arguments.out, use=json.dumps(use) if use else "", share=index) as out:
            if not alone:
                distributed.agree("start", lambda: use | {"--out": locks.mark(out)})
            source = from_file(arguments, *read) if arguments.predictions else from_model(arguments, *read)
            claim(out, source.description, index == 0)
            collect(source, out, index, count)
            if index == 0:
                report_scores(arguments, out, source.root, source.examples)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raise InputError when it is wrong."""
    parser = CommandLine(__doc__, "python -m crab_jax.evaluate")
    parser.add_argument("--checkpoint", type=ANY_PLACE, help="workdir of a training run, or a packed model")
    parser.add_argument(
        "--predictions", type=ANY_PLACE, metavar="FILE", help="score these answers instead of a model's"
    )
    parser.add_argument("--out", type=ANYWHERE, required=True, help="folder for results, predictions and masks")
    parser.add_argument("--data", type=ANY_PLACE, default="", help="data root (default: that of training)")
    parser.add_argument(
        "--split",
        type=Name(),
        default="test",
        help="name of <data>/<split>.jsonl, or of a split of the datasets of a raw root (default test)",
    )
    parser.add_argument(
        "--datasets", default="", metavar="A,B", help="datasets of a raw root (default: those of the joint stage)"
    )
    parser.add_argument("--variant", default="train", choices=VARIANTS, help="prompts of a raw root (default train)")
    parser.add_argument(
        "--missing",
        default="raise",
        choices=("raise", "skip"),
        help="files that a raw root lacks: stop, or leave out the examples that need them (default raise)",
    )
    parser.add_argument(
        "--malformed",
        default="raise",
        choices=("raise", "skip"),
        help="annotations that cannot be read: stop, or leave them out (default raise)",
    )
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"tasks, some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--limit", type=Whole(1), help="at most this many examples of each task")
    parser.add_argument(
        "--batch-size",
        type=Whole(1, 2**16),
        help="examples per batch (default: as many as the device's memory has room for, 16 on a CPU)",
    )
    parser.add_argument(
        "--max-new-tokens", type=Whole(1, 2**16), default=256, help="longest answer in tokens (default 256)"
    )
    parser.add_argument(
        "--weights",
        default="float",
        choices=KINDS,
        help="dtype of the language model's matrices: as trained, or smaller, less exact integers (docs/generation.md)",
    )
    parser.add_argument(
        "--tensor",
        type=Whole(0, 2**16),
        default=0,
        metavar="N",
        help="split each copy of the model over N "
        "devices (default: as few as hold it); every device takes part, see docs/generation.md",
    )
    parser.add_argument("--mute-audio", action="store_true", help="replace all sound by silence")
    parser.add_argument(
        "--blank-video", action="store_true", help="replace every picture by black, the one to segment included"
    )
    parser.add_argument(
        "--force-masks",
        action="store_true",
        help="append the mask tokens where the model wrote none, so that every picture gets a mask",
    )
    parser.add_argument("--process", type=_process, metavar="I/N", help="answer the share of process I of N, from 0/N")
    parser.add_argument(
        "--examples", type=Whole(0, 10**4), default=2, metavar="K", help="worst and best examples to draw per task"
    )
    parser.add_argument(
        "--cache-dir",
        type=ANY_PATH,
        default="",
        metavar="DIR",
        help="folder that keeps decoded media for the next evaluation (default: decode every time)",
    )
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    if bool(arguments.checkpoint) == bool(arguments.predictions):
        raise InputError(
            "command line",
            "--checkpoint",
            "exactly one of --checkpoint and --predictions is needed",
            "give a model to evaluate or a file to score",
        )
    return arguments


def _process(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) < 12 and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command `python -m crab_jax.evaluate`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        run_folder.use_tasks_of(arguments.task_modules, arguments.checkpoint)
        compile_cache.enable()
        evaluate(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
