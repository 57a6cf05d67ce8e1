"""docs/training.md: its commands parse, its keys exist, its launches can be dry-run, its rehearsal runs as written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crab_jax import compile as compile_verb
from crab_jax import evaluate
from crab_jax.config import parse_flags
from crab_jax.convert import __main__ as convert
from crab_jax.convert import importing
from crab_jax.convert.released import COMPONENTS, Choices
from crab_jax.reports import input_plan
from data_pipelines import index, status
from data_pipelines.tokens import Tokenizer

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "training.md").read_text()


def commands(first: str) -> list[list[str]]:
    """The words after `first` of every command in the document's code blocks that begins with it."""
    lines = "\n".join(re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [shlex.split(line[len(first) :]) for line in lines if line.startswith(first + " ")]


def of_train(words: list[str]) -> list[str]:
    """The part of a command line that `python -m crab_jax.train` takes."""
    return [word for word in words if word.startswith(("--config", "--workdir"))]


LAUNCHED = [words for first in ("./launch_tpu.sh run", "sbatch") for words in commands(first)]
EVALUATED = [words[words.index("evaluate") + 1 :] for words in LAUNCHED if "evaluate" in words]
TRAINED = [of_train(words) for words in (*commands("python -m crab_jax.train"), *LAUNCHED) if "evaluate" not in words]


def test_every_way_to_start_a_run_is_there():
    assert len(commands("./launch_tpu.sh run")) >= 4 and len(commands("sbatch")) == 2 == len(EVALUATED)
    assert len(commands("./launch_gke.py")) == 2
    assert len(commands("./launch_tpu.sh delete")) == 1 == len(commands("python -m crab_jax.train"))
    stages = {word.partition("=")[2] for words in TRAINED for word in words if word.startswith("--config=")}
    tabled = set(re.findall(r"^\| `(configs/\w+\.py)`", TEXT, re.MULTILINE))
    assert all((REPOSITORY / name).is_file() for name in stages | tabled)
    assert tabled == {
        f"configs/{name}.py"
        for name in ("pretrain_visual", "pretrain_audio", "pretrain_seg", "finetune", "finetune_avs")
    }


@pytest.mark.parametrize("words", TRAINED, ids=lambda words: f"{words[0]} {words[-1]}")
def test_training_commands_parse(words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    config, workdir = parse_flags(sys.argv, None)
    assert str(workdir) == words[-1].partition("=")[2]
    for word in words[1:-1]:
        key, _, value = word.removeprefix("--config.").partition("=")
        assert str(config.flat()[key]) == value


def test_stage_table_agrees_with_the_configs(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    rows = re.findall(r"^\| `(configs/\w+\.py)`[^|]*\| (\d+) \|", TEXT, re.MULTILINE)
    assert len(rows) >= 5
    for file, batch in rows:
        config, _ = parse_flags(["train", f"--config={file}"], None, workdir=False)
        assert config.mixture.batch_size == int(batch), file


def test_named_keys_exist(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config, _ = parse_flags(["train", "--config=configs/finetune.py"], None, workdir=False)
    keys = config.flat().keys()
    sections = "|".join(sorted({key.split(".")[0] for key in keys if "." in key}))
    named = set(re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_.0-9]+)[`=]", TEXT))
    assert len(named) > 6
    missing = {name for name in named if not any(key == name or key.startswith(f"{name}.") for key in keys)}
    assert not missing, missing


def test_other_commands_parse(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for words in commands("python -m crab_jax.convert"):
        convert.parser().parse_args(words)
    for words in (*commands("python -m crab_jax.evaluate"), *EVALUATED):
        evaluate.parse_arguments(words)
    for words in commands("python -m crab_jax.compile"):
        _, rest = compile_verb.command_line().parse_known_args(words)
        assert not [word for word in rest if not word.startswith("--config.")]
    parse = {
        "status": status.command_line(None, "status").parse_args,
        "plan": input_plan.command_line().parse_args,
        "index": index.parse_arguments,
    }
    for verb, *words in commands("python -m data_pipelines"):
        parse[verb](words)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="what is launched is a git commit")
@pytest.mark.parametrize(
    "words",
    [[verb, *words] for verb in ("run", "delete") for words in commands(f"./launch_tpu.sh {verb}")],
    ids=lambda words: words[-1],
)
def test_launches_can_be_dry_run(words):
    done = subprocess.run(
        ["./launch_tpu.sh", words[0], "--dry-run", *words[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": "no local check"},
    )
    assert done.returncode == 0, done.stderr
    for word in of_train(words):
        assert word in done.stdout


def test_the_import_from_nothing_draws_what_crab_adds_and_nothing_else(golden, tmp_path, monkeypatch):
    """The document's first command, on the golden encoders, up to the drawing itself."""
    (words,) = commands("python -m crab_jax.convert import")
    given = convert.parser().parse_args(["import", *words])
    assert not given.crab and given.fresh == list(COMPONENTS)
    weights = golden / "weights"
    Tokenizer.load(weights / "llama").save(tmp_path)
    sizes = json.loads((golden / "manifest.json").read_text())["config"]
    files = importing.Files(
        weights / "clip",
        weights / "llama",
        next((weights / "beats").glob("*.pt")),
        (),
        tmp_path,
        fresh=tuple(given.fresh),
    )

    class Reached(Exception):
        pass

    def draw(cfg, seed, paths):
        raise Reached(paths)

    monkeypatch.setattr(importing, "_draw", draw)
    with pytest.raises(Reached) as reached:
        importing.import_weights(files, tmp_path / "out", Choices(taps=tuple(sizes["select_layer_list"])))
    drawn = {"lora" if "/lora_" in path else path.split("/")[0] for path in reached.value.args[0]}
    assert drawn == set(COMPONENTS)


@pytest.mark.exhaustive
def test_the_rehearsal_runs_as_written(scenes_root, tmp_path):
    """On eight virtual devices; every value that it writes is explained."""
    (block,) = [block for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) if "xla_force_host" in block]
    short = " --config.steps=1 --config.data.batch_size=4 --config.log_every=1"
    script = block.strip() + short
    for written, real in (
        ("runs/demo/scenes", scenes_root),
        ("runs/rehearsal", tmp_path / "run"),
        ("python -m", f"{sys.executable} -m"),
        ("device_count=8", 'device_count=8" $XLA_FLAGS"'),
    ):
        script = script.replace(written, str(real))
    done = subprocess.run(["bash", "-ec", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^step 1/1  loss", done.stdout, re.MULTILINE)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in {re.sub(r"^loss/.*", "loss/", key) for key in record}:
        assert f"`{name}" in TEXT, name
