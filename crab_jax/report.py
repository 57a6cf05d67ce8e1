"""One HTML file about a run: what was trained, how well it answers, and what it looks at.

    python -m crab_jax.report --run runs/x --results runs/x/test/results.json --data runs/scenes --out report.html

The file holds its pictures, needs no network, and reads well on a phone and on paper. --results is what evaluate
writes, optionally with "baselines": {name: {task: ...}} in it. Examples are answered anew with the run's checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab_jax import charts, compile_cache, overlay, page, runs
from crab_jax.bounds import PATH, Choice, Name, Number, Text, Whole
from crab_jax.errors import CommandLine, InputError, run_verb
from crab_jax.files import out_file
from crab_jax.inference import Prediction, predict_examples
from crab_jax.inspect import Routing, answered_batches, router_weights, routing_pictures, spread
from crab_jax.models.crab import fuse_model
from crab_jax.page import NONE, Html, Picture, Section, figure, score, table
from crab_jax.scoring import PARSED
from crab_jax.structured import Each, check, read_json, read_lines
from crab_jax.tasks import TASKS
from crab_jax.tasks.text import normalise
from data_pipelines import media, shards
from data_pipelines.decoded import inside, read_mask
from data_pipelines.examples import Example
from data_pipelines.fbank import envelope
from data_pipelines.shards import all_windows

SECTIONS = {
    "run": "What was run",
    "loss": "Losses",
    "scores": "Scores",
    "masks": "Masks",
    "boxes": "Boxes",
    "times": "Time lines",
    "answers": "Questions and captions",
    "routing": "Routing of the LoRA heads",
}
CONFIG_KEYS = ("model", "compat", "init_from", "seed", "steps", "optim.lr", "data.batch_size", "data.root")


@dataclasses.dataclass(frozen=True)
class ReportData:
    """All that a report shows; empty parts are said to be missing.

    config: flat {'optim.lr': 1e-4}. metrics: records of metrics.jsonl. results: see scoring.summarise, with baselines.
    pictures: section key ("masks", "boxes", "times") -> examples. answers: (task, question, truth, answer).
    """

    title: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Sequence[Picture]] = dataclasses.field(default_factory=dict)
    answers: Sequence[tuple[str, str, str, str]] = ()
    routing: Mapping[str, Routing] = dataclasses.field(default_factory=dict)


# What the examples look like.


def picture_of(example: Example, root: Path, clock: str) -> np.ndarray:
    """uint8[H,W,3]: the picture that an Example asks about, at its own size (enlarged, where the root is prepared).
    `clock`: the one that the model was asked by, see `Compat`."""
    path = example.seg_image or example.image or (example.frames[example.second or 0] if example.frames else None)
    if prepared := shards.opened(root):
        small = prepared.picture(path, "image") if path else prepared.video(str(example.video))[example.second or 0]
        size = prepared.picture_size(path, "image") if path else prepared.video_size(str(example.video))
        return np.array(Image.fromarray(small).resize(size))
    if path is None:
        size = media.video_size(inside(root, str(example.video)))
        frame = media.read_video(inside(root, str(example.video)), 10, max(size), clock)[example.second or 0]
        return np.array(Image.fromarray(frame).resize(size))
    return media.read_picture(inside(root, path))


def enlarged(picture: np.ndarray, height: int = 240) -> np.ndarray:
    """A picture at `height`, aspect kept: what is drawn over it is then as sharp as the page shows it."""
    width = round(picture.shape[1] * height / picture.shape[0])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def mask_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """Picture, true mask and predicted mask side by side; for class maps with the names of the colours."""
    picture = enlarged(picture_of(example, root, clock))
    size = picture.shape[1], picture.shape[0]
    truth = overlay.resize_mask(read_mask(root, example, max(size)), size)
    truth = truth.astype(bool) if example.mask_kind == "binary" else truth
    drawn, masks = [(picture, "picture"), (overlay.overlay_mask(picture, truth, overlay.TRUTH), "truth")], [truth]
    if prediction.mask is not None:
        masks.append(overlay.resize_mask(prediction.mask, size))
        drawn.append((overlay.overlay_mask(picture, masks[1]), "prediction"))
    row = overlay.side_by_side(drawn)
    if example.mask_kind == "semantic":
        row = overlay.legend(row, overlay.class_colours(*masks))
    asked = example.meta.get("expression") or ", ".join(map(str, example.meta.get("objects", ()))) or "nothing sounds"
    said = "; ".join(prediction.warnings) or "compare the outline of the prediction with the truth"
    return Picture(overlay.png(row), f"{example.task} {example.id} ({asked}): {said}.")


def box_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """True and predicted ARIG boxes over the picture."""
    boxes = [(example.meta["box"], overlay.TRUTH, f"truth: {example.meta['object']}")]
    if prediction.parsed:
        boxes.append((prediction.parsed, overlay.PREDICTION, "answer"))
    drawn = overlay.overlay_boxes(enlarged(picture_of(example, root, clock), 300), boxes)
    said = "the two boxes should coincide" if prediction.parsed else "no box could be read in the answer"
    return Picture(overlay.png(drawn), f"{example.task} {example.id}: {said}.")


def _clip(example: Example, root: Path, clock: str) -> tuple[np.ndarray, np.ndarray, float]:
    """The sound of a clip, float[N], frames of it, uint8[T,h,w,3], and its length in seconds.

    A prepared root has no sound, only filter banks: what is drawn then is as loud as they are.
    """
    path, frames = str(example.audio or example.video), np.zeros((0, 1, 1, 3), np.uint8)
    if prepared := shards.opened(root):
        bands = prepared.sound(path, all_windows(example.windows), None, example.video)
        return (
            envelope(bands),
            prepared.video(example.video) if example.video else frames,
            prepared.seconds(path, example.windows, example.video),
        )
    sound = media.clip_sound(inside(root, path), example.video and inside(root, example.video), clock)
    if example.video:
        frames = media.read_video(inside(root, example.video), overlay.PARTS, 96, clock)
    return sound, frames, len(sound) / media.SAMPLE_RATE


def time_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """Each true event over the predicted one of the same name, on the time line of the clip."""
    found = [
        (track, source)
        for source, label, colour in (
            ("truth", example.meta, overlay.TRUTH),
            ("answer", prediction.parsed, overlay.PREDICTION),
        )
        for track in overlay.event_tracks(example.task, label, colour)
    ]
    order = list(dict.fromkeys(normalise(track.label) for track, _ in found))
    tracks = [
        track._replace(label=f"{track.label}, {source}")
        for track, source in sorted(found, key=lambda one: order.index(normalise(one[0].label)))
    ]
    sound, frames, seconds = _clip(example, root, clock)
    data = overlay.timeline(sound, frames, tracks, seconds)
    said = (
        "each answer bar should cover the truth bar of the same event"
        if prediction.parsed
        else "no event could be read in the answer"
    )
    return Picture(data, f"{example.task} {example.id}: {said}.")


def collect(predictions: Iterable[Prediction], root: Path, clock: str = "shown") -> dict[str, Any]:
    """The `pictures` and `answers` of a report, in the order of the tasks."""
    pictures: dict[str, list[Picture]] = {"masks": [], "boxes": [], "times": []}
    answers = []
    for prediction in sorted(predictions, key=lambda p: (list(TASKS).index(p.example.task), p.example.id)):
        example = prediction.example
        if example.mask_kind != "none":
            pictures["masks"].append(mask_picture(example, prediction, root, clock))
        elif example.task == "arig":
            pictures["boxes"].append(box_picture(example, prediction, root, clock))
        elif example.task in ("ave", "avvp"):
            pictures["times"].append(time_picture(example, prediction, root, clock))
        else:
            meta = example.meta
            question = meta.get("question") or example.instruction.rpartition("\n")[2]
            answers.append((example.task, question, str(meta.get("answer") or meta["captions"][0]), prediction.text))
    return {"pictures": pictures, "answers": answers}


# The HTML.


def _run_section(data: ReportData) -> Html:
    shown = [(key, data.config[key]) for key in CONFIG_KEYS if key in data.config]
    counts = [(f"test examples of {task}", scores["n"]) for task, scores in data.results.get("tasks", {}).items()]
    full = "\n".join(f"{key} = {value!r}" for key, value in sorted(data.config.items()))
    every = Html("<details><summary>Every setting</summary><pre>{}</pre></details>").format(full)
    return table(("setting", "value"), [*shown, *counts]) + every


def _loss_section(data: ReportData) -> Html:
    if not data.metrics:
        return NONE
    by_part = charts.loss_curves(data.metrics, ("loss", "text", "bce", "dice", "ce"))
    by_task = charts.loss_curves(data.metrics, tuple(TASKS))
    return figure(
        Picture(
            by_part,
            "Loss of each part: every line should fall and level off; a part that rises again "
            "is drowned by the others.",
        )
    ) + figure(Picture(by_task, "Text loss of each task: look for a task that stays far above the others."))


def every_metric(tasks: Mapping[str, Any]) -> Html:
    """Each metric with what it is, over all samples and over the answered ones, and the counts."""
    parts = []
    for name, row in tasks.items():
        rows = [
            (
                Html("<b>{}</b>").format(m) if m == TASKS[name].headline else m,
                what,
                score(row, m),
                score(row, m + PARSED),
            )
            for m, what in TASKS[name].metrics.items()
            if m in row
        ]
        counts = f"N {row['n']}, unreadable text {row['n_unparsed']}" + (
            f", without mask {row['n_no_mask']}" if TASKS[name].mask_kind != "none" else ""
        )
        parts.append(
            Html("<h3>{}</h3><p>{}</p>").format(name, counts) + table(("metric", "what it is", "all", "answered"), rows)
        )
    return NONE.join(parts)


def _scores_section(data: ReportData) -> Html:
    tasks = data.results.get("tasks", {})
    if not tasks:
        return NONE
    columns = {"trained": tasks, **data.results.get("baselines", {})}
    heads = ("task", "metric", "n", *columns)
    rows = [
        (
            task,
            TASKS[task].headline,
            scores["n"],
            *(score(column.get(task, {}), TASKS[task].headline) for column in columns.values()),
        )
        for task, scores in tasks.items()
    ]
    unread = [(task, s["n"], s.get("n_unparsed", 0), s.get("n_no_mask", 0)) for task, s in tasks.items()]
    chart = Picture(
        charts.score_bars(columns),
        "Headline metric of each task with its interval: the top bar, the "
        "trained model, should end right of every baseline, with intervals apart.",
    )
    note = Html("<p>Headline metric of each task, with 95 % bootstrap intervals over the examples.</p>")
    return (
        note
        + table(heads, rows)
        + figure(chart)
        + Html("<details><summary>Every metric of the trained model</summary>{}</details>").format(every_metric(tasks))
        + Html("<h3>Answers that could not be used</h3>")
        + table(("task", "n", "unreadable text", "no mask"), unread)
    )


def _routing_section(data: ReportData) -> Html:
    return NONE.join(map(figure, routing_pictures(data.routing).values())) if data.routing else NONE


def _answers_section(data: ReportData) -> Html:
    return table(("task", "question", "truth", "answer"), data.answers) if data.answers else NONE


def _pictures_section(key: str, data: ReportData) -> Html:
    return NONE.join(map(figure, data.pictures.get(key, ())))


_BODIES = {
    "run": _run_section,
    "loss": _loss_section,
    "scores": _scores_section,
    "answers": _answers_section,
    "routing": _routing_section,
}


def write(out_html: str | Path, data: ReportData) -> None:
    """Write the report as one file that refers to nothing outside itself."""
    bodies = {key: _BODIES[key](data) if key in _BODIES else _pictures_section(key, data) for key in SECTIONS}
    page.write(out_html, data.title, page.LEGEND, [Section(key, title, bodies[key]) for key, title in SECTIONS.items()])


# The verb.

METRICS = Each(Text(1, 200), Number())  # a line of metrics.jsonl
SCORES = {
    "n": Whole(),
    "n_unparsed?": Whole(),
    "n_no_mask?": Whole(),
    "intervals?": Each(Text(1, 200), (Number(), Number())),
}
_TASK = Choice(tuple(TASKS))
RESULTS = {"tasks": Each(_TASK, SCORES), "baselines?": Each(Text(1, 100), Each(_TASK, SCORES))}


def read_results(path: Path) -> dict[str, Any]:
    """What evaluate wrote. Raises InputError, also for a metric that is no number."""
    fix = "give the results.json of evaluate"
    if not path.is_file():
        raise InputError(str(path), "--results", "no such file", fix)
    results = read_json(path, RESULTS, "--results", fix)
    for at, tasks in (("tasks", results["tasks"]), *results.get("baselines", {}).items()):
        for name, row in tasks.items():
            check(
                {key: value for key, value in row.items() if key != "intervals"},
                Each(Text(), Number()),
                str(path),
                f"{at}.{name}",
            )
    return results


def report(arguments: argparse.Namespace) -> None:
    """Answer a few examples, look at the router, and write the report."""
    run, root = Path(arguments.run), Path(arguments.data)
    out_file(arguments.out)
    results = read_results(Path(arguments.results))
    examples = runs.read_examples(root, arguments.split)
    model, params, config, tokenizer = runs.load_model(run)
    log = run / "metrics.jsonl"
    metrics = list(read_lines(log, METRICS, constants=True)) if log.is_file() else []

    shown = spread(examples, arguments.samples)
    # As `evaluate` answers; the layout of generation does not tell router weights.
    answered = collect(
        predict_examples(
            *fuse_model(model, params),
            config,
            tokenizer,
            shown,
            root,
            arguments.batch_size,
            arguments.max_new_tokens,
            on_error="raise",
        ),
        root,
        config.data.clock,
    )
    routed = spread(examples, arguments.routing_samples)
    batches = answered_batches(routed, root, config, tokenizer, arguments.batch_size)
    write(
        arguments.out,
        ReportData(
            title=f"Report of {run.name}",
            config=config.flat(),
            metrics=metrics,
            results=results,
            **answered,
            routing=router_weights(model, params, batches),
        ),
    )
    print(f"report: {arguments.out} ({Path(arguments.out).stat().st_size / 1e6:.1f} MB)")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__, "python -m crab_jax.report")
    parser.add_argument("--run", type=PATH, required=True, help="workdir of a training run, or a packed model")
    parser.add_argument(
        "--results", type=PATH, required=True, help="results.json of evaluate, optionally with baselines"
    )
    parser.add_argument("--data", type=PATH, required=True, help="data root that the examples come from")
    parser.add_argument("--out", type=PATH, required=True, help="HTML file to write")
    parser.add_argument("--split", type=Name(), default="test", help="reads <data>/<split>.jsonl")
    parser.add_argument("--samples", type=Whole(1), default=3, help="examples shown of each task")
    parser.add_argument(
        "--routing-samples", type=Whole(1), default=16, help="examples of each task for the router weights"
    )
    parser.add_argument("--batch-size", type=Whole(1, 2**16), default=4)
    parser.add_argument("--max-new-tokens", type=Whole(1, 2**16), default=256)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.report`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        compile_cache.enable()
        report(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
