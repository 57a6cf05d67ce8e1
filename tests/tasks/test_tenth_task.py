"""Tasks of a user, defined in files of their own, from a table to a page: the example of the document and two more."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import clips
import numpy as np
import pytest
from PIL import Image

import crab_jax as cj
from crab_jax import evaluate, predict, report, train
from crab_jax.aot import compile_cache
from crab_jax.config import parse_flags
from crab_jax.io.errors import InputError
from crab_jax.runs import run_folder
from crab_jax.tasks import BENCHMARKS, TASK_NAMES, TASKS, use_tasks
from data_pipelines import validate
from data_pipelines.examples import from_json, read_jsonl
from data_pipelines.labels import disagreements, names
from data_pipelines.own import verb as own

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs/your_data.md").read_text().split("## A task of your own")[1].split("\n## ")[0]
COUNTING = "my_tasks.counting:COUNTING"
PLACES = "my_tasks.places"
ALL = f"{COUNTING},{PLACES}"
# Two more, one of each other kind of answer that needs no mask, in one module.
OTHERS = """
import json
import re

from crab_jax import Event, Task
from crab_jax.tasks.placeholders import AUDIO, IMAGE, VIDEO
from crab_jax.tasks.task import Field, is_list
from crab_jax.tasks.times import is_event


def read(text):
    found = re.search(r"\\[.*\\]", text)
    try:
        return json.loads(found[0]) if found else None
    except ValueError:
        return None


def reduce(samples):
    return {"right": sum(samples_one["right"] for samples_one in samples) / len(samples)}


RINGING = Task(
    name="ringing",
    answer="events",
    events=lambda said: [Event(*one, "heard") for one in (said["events"] if isinstance(said, dict) else said)],
    instruction=lambda variant="train": f"{VIDEO}{AUDIO}When does what ring?",
    target=lambda events, reasoning="": f"{reasoning} {json.dumps(events)}".strip(),
    parse=lambda text: said if is_list(said := read(text), is_event) else None,
    stats=lambda parsed, mask, meta, gt_mask: {"right": parsed == meta["events"]},
    reduce=reduce,
    headline="right",
    metrics={"right": "answers that are the label"},
    label={"events": Field("a list of [name, start, end]", lambda value, meta: is_list(value, is_event, 1))},
)
FINDING = Task(
    name="finding",
    answer="box",
    box=lambda said: said["box"] if isinstance(said, dict) else said,
    instruction=lambda variant="train": f"{IMAGE}{AUDIO}Where is it?",
    target=lambda box, reasoning="": f"{reasoning} {json.dumps(box)}".strip(),
    parse=lambda text: said if is_list(said := read(text), lambda edge: isinstance(edge, int), 4) else None,
    stats=lambda parsed, mask, meta, gt_mask: {"right": parsed == meta["box"]},
    reduce=reduce,
    headline="right",
    metrics={"right": "answers that are the label"},
    label={"box": Field("four numbers", lambda value, meta: is_list(value, lambda edge: isinstance(edge, int), 4))},
    windows=("ten", "one"),
)
"""
ROWS = [
    *({"task": "ringing", "media": f"clips/{name}.mp4", "events": [["Bell", 1, 3]]} for name in ("dog", "street")),
    {"task": "finding", "image": "clips/dog.png", "audio": "clips/dog.mp4", "box": [3, 4, 20, 30], "second": 2},
    {"task": "ringing", "media": "clips/band.mp4", "events": [["Bell", 1, 3], ["Gong", 2, 6]], "split": "test"},
    {"task": "finding", "image": "clips/b.png", "audio": "clips/band.mp4", "box": [0, 4, 9, 30], "split": "test"},
]
SMALL = tuple(
    f"--config.{key}={value}"
    for key, value in {
        "init_from": "",
        "sizes.llama.layers": 1,
        "sizes.clip.layers": 2,
        "sizes.clip.taps": "(1,2,2)",
        "sizes.beats.layers": 1,
        "sizes.visual.layers": 1,
        "sizes.audio.layers": 1,
        "data.batch_size": 2,
        "steps": 2,
        "log_every": 1,
        "eval_every": 0,
    }.items()
)


def block(language: str) -> str:
    """The text of the document in a language."""
    return re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder with the two modules, media, and the tables, on the path of this process."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("my_tasks", "clips"):
        (home / folder).mkdir()
    (home / "my_tasks/counting.py").write_text(block("python"))
    (home / "my_tasks/places.py").write_text(OTHERS)
    (home / "clips.csv").write_text(block("text"))
    (home / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for number, name in enumerate(("dog", "street", "band")):
        clips.write_clip(home / f"clips/{name}.mp4", clips.steady(10), clips.beep(10, 1 + number, 3 + number))
    for name in ("dog", "b"):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(home / f"clips/{name}.png")
    sys.path.insert(0, str(home))
    yield home
    sys.path.remove(str(home))
    forget()


def forget() -> None:
    """Let this process know the nine tasks alone, and no module of the user."""
    for name in set(TASKS) - set(TASK_NAMES):
        del TASKS[name]
    for module in [module for module in sys.modules if module.startswith("my_tasks")]:
        del sys.modules[module]


@pytest.fixture(autouse=True)
def forgotten():
    """Each test begins and ends without tasks of the user."""
    forget()
    yield
    forget()


def run(home: Path, *words: str) -> subprocess.CompletedProcess:
    """A command with the user's folder on the path of Python, as it ended."""
    path = f"{REPOSITORY}{os.pathsep}{home}"
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=home, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def root(home) -> Path:
    """The data root that is made of both tables, the first one by the command of the document."""
    root, options = home / "R", ("--task-modules", ALL, "--copy", "--workers", "1")
    done = run(home, "data_pipelines", "own", "--csv", "clips.csv", "--root", "R", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    former = {path: path.read_text() for path in root.glob("*.jsonl")}
    own.run(["--jsonl", str(home / "more.jsonl"), "--root", str(root), *options, "--overwrite"])
    for path, text in former.items():
        path.write_text(text + path.read_text())
    return root


@pytest.fixture(scope="module")
def trained(home, root) -> Path:
    """A run on those about clips, which are of one bucket; a worker decodes its batches."""
    compile_cache.enable()
    options = ("--config.data.workers=1", "--config.data.weights.counting=2.5", "--config.data.weights.finding=0")
    words = ("train", f"--config={REPOSITORY / 'configs/tiny.py'}", f"--config.data.root={root}", *SMALL, *options)
    config, workdir = parse_flags([*words, f"--workdir={home / 'run'}", f"--config.tasks={ALL}"], "")
    train.train(config, workdir)
    return workdir


@pytest.mark.slow
def test_from_a_table_to_examples(home, root):
    use_tasks([ALL])
    examples = {example.id: example for example in read_jsonl(root / "train.jsonl")}
    counted = examples["bark-1"]
    assert counted.instruction.endswith("How many times is this heard: a bark") and counted.windows == "ten"
    assert counted.target == "It is heard 3 times."
    assert counted.meta == {"question": "a bark", "count": 3, "video": "media/clips/dog.mp4"}
    finding = next(example for example in examples.values() if example.task == "finding")
    assert finding.meta["box"] == [round(224 * 3 / 64), round(224 * 4 / 48), 70, 140] and finding.second == 2
    assert not validate.run(["--root", str(root), "--workers", "1", "--task-modules", ALL])
    with pytest.raises(InputError, match="or name the module of a task of your own with --task-modules"):
        from_json({"id": "a", "task": "humming", "instruction": ""}, "here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("counting,clips/dog.mp4,a bark,some", "is 'some'; must be a whole number from 0 to 999"),
        ("counting,clips/dog.mp4,a bark,", "is empty, and counting needs it; give a whole number"),
        ("counting,clips/dog.mp4,,3", "is empty, and counting needs it; give the question"),
        ("counting,clips/dog.png; clips/dog.mp4,a bark,3", "counting is asked about a video or pictures of a clip"),
        ("avqa,clips/dog.mp4,How many?,3", "is '3', but avqa has no count"),
    ],
)
def test_a_wrong_row_is_refused_by_its_column(home, row, said, tmp_path):
    (home / "wrong.csv").write_text(f"task,media,question,count\n{row}\n")
    options = ["--csv", str(home / "wrong.csv"), "--root", str(tmp_path / "R"), "--copy", "--task-modules", COUNTING]
    with pytest.raises(InputError, match=re.escape(said)):
        own.run(options)


@pytest.mark.slow
def test_a_target_that_differs_from_its_label_is_malformed():
    use_tasks([ALL])
    example = cj.ask(
        np.zeros((10, 8, 8, 3), np.uint8), seconds=10.0, task="counting", question="a bark"
    ).request.example
    example = dataclasses.replace(example, meta={"count": 3}, target="It is heard 3 times.")
    assert disagreements(example) == [] and names(example) == ()
    assert disagreements(dataclasses.replace(example, target="It is heard 4 times.")) == ["says 4, the label says 3"]
    assert disagreements(dataclasses.replace(example, target="Often.")) == ["cannot be read as an answer to counting"]


@pytest.mark.slow
def test_training_notes_the_modules_and_the_losses(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["tasks"] == ALL and config["data"]["weights"]["counting"] == 2.5
    assert config["data"]["weights"].keys() == {*TASK_NAMES, "counting", "ringing", "finding"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {key for line in lines for key in line} >= {"loss/counting", "loss/ringing"}


@pytest.mark.slow
def test_from_a_run_to_pages(home, trained, tmp_path, capsys):
    use_tasks([ALL])
    out, short = tmp_path / "test", ["--max-new-tokens", "8"]
    evaluate.evaluate(
        evaluate.parse_arguments(["--checkpoint", str(trained), "--out", str(out), *short, "--data", str(home / "R")])
    )
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    assert tasks.keys() == {"counting", "ringing", "finding"} and tasks["counting"].keys() >= {"accuracy", "error"}
    page = (out / "results.html").read_text()
    assert "mean difference from the right number" in page and page.count("<figure>") >= 2  # times and box
    words = ["--run", str(trained), "--results", str(out / "results.json"), "--data", str(home / "R")]
    report.report(report.parse_arguments([*words, "--out", str(tmp_path / "report.html"), *short]))
    assert "counting" in (tmp_path / "report.html").read_text()

    film = ["--video", str(home / "clips/dog.mp4"), "--question", "a bark"]
    asked = ["--checkpoint", str(trained), *film, *short]
    predict.predict(predict.parse_arguments([*asked, "--task", "counting", "--out", str(tmp_path / "one")]))
    (line,) = (tmp_path / "one/predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["task"] == "counting"
    predict.predict(predict.parse_arguments([*asked, "--all-tasks", "--out", str(tmp_path / "all")]))
    lines = [json.loads(line) for line in (tmp_path / "all/predictions.jsonl").read_text().splitlines()]
    assert {line["task"] for line in lines} == set(TASKS)
    assert next(line for line in lines if line["task"] == "ringing")["overlay"]
    assert "finding, the box of the answer" in (tmp_path / "all/page.html").read_text()


@pytest.mark.slow
def test_the_library_takes_the_task_itself(home, trained):
    counting = __import__("my_tasks.counting", fromlist=["COUNTING"]).COUNTING
    crab = cj.load(trained, tasks=[counting])
    asked = cj.ask(home / "clips/dog.mp4", task=counting, question="a bark")
    answer = crab.answer(asked, max_new_tokens=8)
    assert asked.task == "counting" and answer.parsed == counting.parse(answer.text)
    assert len(crab.trace(asked, answer="It is heard 3 times.").tokens) > 20
    # Also with a model that never heard of it.
    assert isinstance(cj.load("warm_start").answer(asked, max_new_tokens=8).text, str)


@pytest.mark.slow
def test_a_checkpoint_imports_nothing(home, trained, capsys):
    forget()
    marker = home / "imported"
    (home / "my_tasks/counting.py").write_text(f"open({str(marker)!r}, 'w').close()\n" + block("python"))
    config = cj.load(trained).config
    assert f"--task-modules {ALL}" in capsys.readouterr().err
    assert config.tasks == ALL and set(config.mixture.weights) == set(TASK_NAMES)  # the others go on
    with pytest.raises(InputError, match=r"unknown task 'counting'"):
        cj.ask(home / "clips/dog.mp4", task="counting", question="a bark")
    words = ("--checkpoint", str(trained), "--data", "R", "--out", "none")
    done = run(home, "crab_jax.evaluate", *words)
    assert done.returncode == 2 and not marker.exists()
    warning, error = done.stderr.strip().splitlines()[-2:]
    assert warning.startswith("warning: ") and f"--task-modules {ALL}" in warning
    assert error.startswith("error: ") and "--task-modules" in error
    use_tasks([COUNTING])
    assert marker.exists()
    (home / "my_tasks/counting.py").write_text(block("python"))


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("no_such_module", "cannot be imported (ModuleNotFoundError"),
        ("my_tasks.broken", "cannot be imported (ZeroDivisionError"),
        ("my_tasks.counting:NOTHING", "the module holds no Task named NOTHING"),
        ("json", "the module holds no Task"),
        ("my_tasks.clash", "is the name of a task of crab_jax"),
        ("my_tasks.counting,my_tasks.second", "is the name of another task, of my_tasks.counting"),
        ("my tasks; rm", "cannot be imported"),
    ],
)
def test_what_is_no_task_is_refused(home, modules, said):
    (home / "my_tasks/broken.py").write_text("1 / 0\n")
    (home / "my_tasks/clash.py").write_text(block("python").replace('"counting"', '"ave"'))
    (home / "my_tasks/second.py").write_text(block("python"))
    with pytest.raises(InputError, match=re.escape(said)):
        use_tasks([modules])


def test_a_task_that_is_run_again_takes_the_place_of_the_former(home):
    counting = __import__("my_tasks.counting", fromlist=["COUNTING"]).COUNTING
    again = dataclasses.replace(counting, published=())
    use_tasks([counting, again, again])
    assert TASKS["counting"] is again and tuple(TASKS)[:9] == TASK_NAMES == tuple(task.name for task in BENCHMARKS)


def test_an_old_run_has_no_tasks(tmp_path):
    """config.json of before the key: nine weights, and no `tasks`."""
    config = json.loads((REPOSITORY / "crab_jax/warm_start/config.json").read_text())
    assert "tasks" not in config and set(config["data"]["weights"]) == set(TASK_NAMES)
    assert run_folder.load_config("warm_start").tasks == ""
