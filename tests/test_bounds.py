"""Every key of a run config and every option of every command: a value that means something, or one line."""

import argparse
import dataclasses
import functools
import importlib
import inspect
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from crab_jax import optim
from crab_jax.config import BOUNDS, bound_of, leaves, parse_flags, resolve
from crab_jax.defaults import COMPAT_SIZES
from crab_jax.io.bounds import Choice, Fixed, Flag, Modules, Name, Patterns, Place, Places, Real, Whole, Wholes, Words
from crab_jax.io.errors import InputError
from crab_jax.losses import LossConfig
from crab_jax.models import presets
from crab_jax.optim import OptimConfig

CONFIGS = sorted(file.stem for file in Path("configs").glob("[a-z]*.py") if file.stem != "common")
WALKED = ("tiny", "finetune")  # of every model and of the data; the others differ from them in values only
TEXTS = (
    "abc",
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0.0",
    "1",
    "2",
    "1.5",
    "1e-300",
    "1e30",
    "1e400",
    "9" * 40,
    str(2**31),
    str(2**63),
    "True",
    "None",
    "(1,)",
    "('a',)",
    "()",
    "[]",
    "(",
    "('(',)",
    "{}",
    "(-1,2)",
    "(nan,)",
    "(3,2,1)",
    "(True,2)",
    "gs://bucket/x",
    "file:///x",
    "a,b",
    "../x",
    "x" * 3000,
    "\0",
    "\U0001f980",
)
VALUES = (
    True,
    None,
    -1,
    0,
    1,
    2**31,
    10**40,
    -0.5,
    0.0,
    0.5,
    1e-300,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "abc",
    "s3://b",
    (),
    (0,),
    (1, -1),
    ("a", 1),
    (float("nan"),),
    ["("],
    {},
    b"x",
    object(),
)


def survives(config) -> None:
    """An accepted config means something: all is built from it, and an update moves a parameter, downhill."""
    rate = np.array(optim.learning_rate(config.optim, config.steps)(jnp.array([0, 1, 2])))
    assert np.isfinite(rate).all() and (rate >= 0).all() and rate.any()


def test_the_walk_over_every_key_of_the_command_line():
    """Texts of all kinds for each key: a config that can be built, or one InputError that names the key."""
    keys = [key for key, _ in leaves(tiny.get_config())]
    outcomes: Counter[str] = Counter()
    optims = set()
    for key in keys:
        for text in TEXTS:
            try:
                config, _ = parse_flags(["train", "--config=configs/tiny.py", f"--config.{key}={text}"], None, False)
            except InputError as error:
                outcomes["refused"] += 1
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, key
                continue
            outcomes["accepted"] += 1
            assert not bound_of(key).problem(config.flat()[key]), key
            if (built := repr((config.optim, config.steps))) not in optims:
                optims.add(built)
                survives(config)
    print(f"{len(keys)} keys, {len(TEXTS)} values each: {dict(outcomes)}, no traceback")
    assert len(keys) >= 142 and sum(outcomes.values()) == len(keys) * len(TEXTS) >= 5000
    assert outcomes["accepted"] > 300 and outcomes["refused"] > 4000


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[] if name in WALKED else pytest.mark.exhaustive) for name in CONFIGS]
)
def test_the_walk_over_every_value_that_a_config_file_may_hold(stage):
    """Values of every Python type, as a config file of one's own could set them."""
    module = importlib.import_module(f"configs.{stage}")
    resolve(module.get_config())
    outcomes: Counter[str] = Counter()
    config = module.get_config()
    for key, usual in leaves(module.get_config()):
        *path, last = key.split(".")
        section = functools.reduce(lambda found, name: found[name], path, config)
        for value in VALUES:
            with section.ignore_type():
                section[last] = value
            try:
                resolve(config)
                outcomes["accepted"] += 1
            except InputError as error:
                outcomes["refused"] += 1
                assert len(str(error).splitlines()) == 1 and key.split(".")[0] in str(error), (key, value)
        with section.ignore_type():
            section[last] = usual
    resolve(config)
    print(f"{stage}: {dict(outcomes)}, no traceback")
    assert sum(outcomes.values()) == len(VALUES) * len(list(leaves(module.get_config()))) > 3500


def test_every_key_has_a_bound_of_its_own_type():
    kinds = {
        int: (Whole,),
        float: (Real,),
        bool: (Flag, Fixed),
        str: (Choice, Place, Places, Name, Words, Modules),
        tuple: (Patterns, Wholes),
    }
    for key, value in leaves(tiny.get_config()):
        if not key.startswith("sizes."):
            assert isinstance(bound_of(key), kinds[type(value)]), f"{key} needs a line in crab_jax/config.py"
    assert BOUNDS.keys() <= {key for key, _ in leaves(tiny.get_config())}, "a bound of a key that is no more"

    def fields(sizes, prefix):
        for field in dataclasses.fields(sizes):
            value = getattr(sizes, field.name)
            if dataclasses.is_dataclass(value):
                yield from fields(value, f"{field.name}.")
            else:
                yield f"sizes.{prefix}{field.name}", value

    for key, value in fields(resolve(tiny.get_config()).model, ""):
        if key.rpartition(".")[2] in COMPAT_SIZES:
            continue
        assert not bound_of(key).problem(value), key
        if not isinstance(value, bool):
            assert isinstance(bound_of(key), (*kinds[type(value)], Choice)), (
                f"{key} needs a line in crab_jax/models/presets.py"
            )
    assert len(presets.BOUNDS) > 30


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("sizes.llama.heads=3",), "sizes.llama.heads.*3 does not divide sizes.llama.hidden = 128"),
        (("sizes.llama.kv_heads=3",), "sizes.llama.kv_heads.*does not divide sizes.llama.heads = 4"),
        (("sizes.llama.heads=128", "sizes.llama.kv_heads=128"), "1 channels; make it an even number"),
        (("sizes.clip.taps=(2,3,9)",), "taps.*0..4"),
        (("sizes.clip.taps=(1,2)",), "sizes.clip.taps.*give 3"),
        (("sizes.llama.remat=some",), "sizes.llama.remat.*auto, full, attention, projections, offload, dots, none"),
        (("sizes.seg.dtype=float8",), "sizes.seg.dtype.*float32, bfloat16"),
        (("frozen_dtype=int8",), "frozen_dtype.*bfloat16"),
        (("sizes.visual.out_dim=64",), "llama.hidden is 128"),
        (("sizes.clip.image_size=72",), "sizes.seg.grid.*is 9"),
        (("sizes.beats.num_buckets=31",), "make it even"),
        (("data.limit=-1",), r"data.limit.*0 = all"),
        (("data.prompt_only=true",), "nothing to learn"),
        (("data.datasets=ave,llp",), "data.datasets.*must be some of ave,avvp"),
        (("data.split=../val",), "data.split"),
        (("loss.text=0", "loss.bce=0", "loss.dice=0", "loss.ce=0"), "loss.*nothing is learned"),
        (("trainable=()",), "trainable.*at least one"),
        (("trainable=('(',)",), "regular expression"),
        (("optim.lr=0",), "optim.lr"),
        (("optim.lr=1e-60",), "optim.lr"),
        (("optim.b2=1",), "optim.b2"),
        (("data.lengths=(192,144)",), "data.lengths.*increasing"),
        (("seed=-1",), "seed"),
        (("sizes.lora.rank=4096",), "lora.rank.*sizes.llama.hidden = 128"),
        (("data.datasets=ave,ave",), "each once"),
        (("data.curriculum.ave=600",), "curriculum.ave.*ends after step 600"),
        (("loss.text=0", "loss.bce=0", "loss.dice=0", "data.weights.avss=0"), "loss.text.*nothing is learned"),
        (("init_from=~/run",), "init_from.*not expanded"),
        (("tokenizer=$HOME/t",), "tokenizer.*not expanded"),
        (("data.root=s3:/b/x",), "data.root.*is a URL"),
        (("data.cache_dir=C:\\x",), "cache_dir.*path of Windows"),
        (("data.root=here ",), "data.root.*white space"),
        (("init_from=-",), "init_from.*is no path"),
        (("data.cache_dir=gs://bucket/x",), r"cache_dir.*is a URL.*copy it to a folder"),
        (("init_from=gs:/bucket/run",), r"init_from.*is a URL.*write gs://bucket/run"),
        (("init_from=az://bucket/run",), r"init_from.*is a URL.*mount the bucket"),
        (("data.root=hf://datasets/x",), r"data.root.*is a URL"),
        (("tokenizer=https://h/t.json",), "tokenizer.*download it"),
        (("data.cache_dir=file:///tmp/x",), "data.cache_dir.*give the path itself"),
    ],
)
def test_what_a_refusal_says(flags, said):
    with pytest.raises(InputError, match=said):
        parse_flags(["train", "--config=configs/tiny.py", *(f"--config.{flag}" for flag in flags)], None, False)


@pytest.mark.parametrize("workdir", ["az://b/run", "gs://", "file:///x", "", "~/x", "gs:/b/run", "$HOME/x", " x", "-"])
def test_a_workdir_is_a_folder(workdir):
    with pytest.raises(InputError, match="--workdir"):
        parse_flags(["train", "--config=configs/tiny.py", f"--workdir={workdir}"], None)


def test_a_path_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~", "$x", " a ", "-", "b:"):
        (tmp_path / name).mkdir()
    for path in ("~/", "$x", " a ", "-", "b:/new", "file:x.mp4", "12:30:05.mp4", "./~", "$5 bill.mp4", "c:x", "%20"):
        assert not Place().problem(path), path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def get_config(:", "invalid syntax"),
        ("x = 1", "get_config"),
        ("def get_config():\n    return {'steps': 1}", "dict"),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'steps': 1})", "is missing"),
        (
            "from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n    c.optim.lrr = 1\n    return c",
            "optim.lrr.*is no key",
        ),
        ("import nowhere", "nowhere"),
        (None, "No such file"),
    ],
)
def test_a_config_file_of_ones_own_that_is_none_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        parse_flags(["train", f"--config={tmp_path}/mine.py"], None, False)
    assert len(str(refused.value).splitlines()) == 1


def updates(clip_norm: float, scale: float) -> np.ndarray:
    params, gradient = {"w": np.ones(3, np.float32)}, {"w": scale * np.array([1.0, -2.0, 3.0], np.float32)}
    steps = optim.optimizer(OptimConfig(lr=1e-2, eps=1e-3, clip_norm=clip_norm), 100)
    state = steps.init(params)
    for _ in range(5):
        update, state = steps.update(gradient, state, params)
        params = optax.apply_updates(params, update)
    return np.asarray(params["w"])


def test_a_clip_norm_of_0_is_off_and_less_is_refused():
    np.testing.assert_array_equal(updates(0, 7.0), updates(1e9, 7.0))
    assert np.abs(updates(0, 1e-3) - updates(1e-4, 1e-3)).max() > 1e-3, "a small norm does clip"
    assert (np.sign(updates(0, 7.0) - 1) == [-1, 1, -1]).all(), "downhill"
    for value in (-1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(InputError, match="optim.clip_norm"):
            OptimConfig(clip_norm=value)
    with pytest.raises(InputError, match="loss.dice"):
        LossConfig(dice=-1.0)


def test_the_optimizer_state_is_one_tree_with_and_without_clipping():
    import jax

    trees = [
        jax.tree.structure(optim.optimizer(OptimConfig(clip_norm=norm), 9).init({"w": np.ones(2)}))
        for norm in (0.0, 1.0)
    ]
    assert trees[0] == trees[1]


# Command lines. Whatever an option is given, the rest of the command names nothing that exists.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "evaluate": ("crab_jax.evaluate", ["--checkpoint", "nowhere", "--out", "OUT"]),
    "evaluate predictions": ("crab_jax.evaluate", ["--predictions", "nowhere", "--data", "nowhere", "--out", "OUT"]),
    "predict": ("crab_jax.predict", ["--checkpoint", "nowhere", "--out", "OUT", "--question", "?", "--video", "none"]),
    "inspect": ("crab_jax.inspect", ["router", "--checkpoint", "nowhere", "--out", "OUT"]),
    "compare": ("crab_jax.compare", ["nowhere", "nowhere"]),
    "report": ("crab_jax.report", ["--run", "nowhere", "--results", "nowhere", "--data", "nowhere", "--out", "OUT/x"]),
    "compile": ("crab_jax.compile", ["--config", "nowhere.py", "--topology", "v5e:1x1"]),
    "import": (
        "crab_jax.convert.__main__",
        ["import", "--clip", "no", "--llama", "no", "--beats", "no", "--out", "OUT"],
    ),
    "export": ("crab_jax.convert.__main__", ["export", "nowhere", "--format", "hf", "--out", "OUT"]),
    "verify": ("crab_jax.convert.__main__", ["verify", "nowhere", "--outputs", "nowhere"]),
    "warmup": ("crab_jax.warmup", ["--data", "nowhere", "--out", "OUT"]),
    "status": ("data_pipelines.__main__", ["status", "--root", "nowhere"]),
    "validate": ("data_pipelines.__main__", ["validate", "--root", "nowhere"]),
    "prepare": ("data_pipelines.__main__", ["prepare", "--root", "nowhere", "--out", "OUT"]),
    "plan": ("data_pipelines.__main__", ["plan", "--config", "configs/tiny.py", "--root", "nowhere"]),
    "index": ("data_pipelines.__main__", ["index", "--root", "nowhere"]),
    "sample": ("data_pipelines.__main__", ["sample", "--root", "nowhere", "--out", "OUT"]),
    "own": ("data_pipelines.__main__", ["own", "--csv", "nowhere", "--root", "OUT"]),
    "tokens": ("data_pipelines.tokens", ["--corpus", "nowhere", "--out", "OUT/x"]),
    "scenes": ("data_pipelines.sources.scenes", ["--out", "OUT", "--seed", "-1"]),
    **{
        f"av_uie {verb}": ("data_pipelines.av_uie.__main__", [verb, *rest])
        for verb, rest in {
            "read": ["--root", "nowhere", "--labels", "nowhere", "--out", "OUT/x"],
            "write": ["--root", "nowhere", "--out", "OUT/x"],
            "annotate": ["--root", "nowhere", "--url", "http://h/v1", "--model", "m", "--out", "OUT/x"],
            "verify": ["--examples", "nowhere", "--out", "OUT"],
            "card": ["--examples", "nowhere", "--out", "OUT"],
        }.items()
    },
}
# Options that are words of the world or names: what they hold is looked at where it is used.
WORDS = {
    "--question",
    "--expression",
    "--task",
    "--tasks",
    "--datasets",
    "--windows",
    "--prompt-variant",
    "--splits",
    "--variants",
    "--variant",
    "--topology",
    "--name",
    "--url",
    "--model",
    "--key-env",
    "--prefix",
    "--state",
    "--parameters",
}


def run(module: str, words: list[str], monkeypatch, capsys) -> tuple[int, list[str]]:
    """(exit code, lines of stderr) of a command."""
    from crab_jax.io.errors import run_verb

    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", ["prog", *words])
    with pytest.raises(SystemExit) as stop:
        if module == "crab_jax.convert.__main__":
            parser = importlib.import_module(module).parser
            run_verb(lambda: main(parser().parse_args(words)))
        elif not inspect.signature(main).parameters:
            run_verb(main)
        else:
            main(words)
    return stop.value.code, capsys.readouterr().err.splitlines()


def parser_of(module: str, words: list[str], monkeypatch, capsys) -> argparse.ArgumentParser:
    """The parser that the last words of a command go to."""
    seen = []
    with monkeypatch.context() as patch:

        def keep(self, args=None, namespace=None, _parse=argparse.ArgumentParser.parse_known_args):
            seen.append(self)
            return _parse(self, args, namespace)

        patch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
        run(module, words, monkeypatch, capsys)
    return seen[-1]


def takes_a_bucket(action: argparse.Action, text: str) -> bool:
    """Whether an option goes on with the name of a bucket, which would be looked for (tests/test_buckets.py does)."""
    if not text.startswith("gs://"):
        return False
    try:  # in place of a word without a name, the text would be the value of the last option
        return not action.option_strings or callable(action.type) and str(action.type(text)) == text
    except (ValueError, argparse.ArgumentTypeError):
        return False


@pytest.mark.parametrize("name", COMMANDS)
def test_the_walk_over_every_option_of_a_command(name, tmp_path, monkeypatch, capsys):
    module, words = COMMANDS[name]
    words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")  # an --out=../x is made
    code, said = run(module, words, monkeypatch, capsys)
    assert (code, len(said)) == (2, 1), said
    tried = 0
    for action in parser_of(module, words, monkeypatch, capsys)._actions:
        if action.nargs == 0 or isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        option = action.option_strings[0] if action.option_strings else ""
        assert action.type not in (int, float, Path), f"{option} has no bounds"
        for text in (text for text in TEXTS if "\0" not in text and not takes_a_bucket(action, text)):
            with_it = [*words, f"{option}={text}"] if option else [*words[:-1], text] if text[:1] != "-" else words
            code, said = run(module, with_it, monkeypatch, capsys)
            tried += 1
            assert code == 2 and len(said) == 1 and said[0].startswith("error: "), (option, text[:50], said)
            if "://" in text and option not in WORDS and not action.choices:
                assert any(words in said[0] for words in ("is a URL", "must be", "is not")), (option, said)
    print(f"{name}: {tried} values tried, no traceback")
    assert tried >= 2 * len(TEXTS)
    assert not [path for path in Path("..").rglob("*") if path.is_file()], "nothing is written"
