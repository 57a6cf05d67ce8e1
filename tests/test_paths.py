"""Paths of users become path objects in one place, and docs/training.md says which flags take a bucket."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from crab_jax import config
from crab_jax.io import bounds, paths

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted(file for package in ("crab_jax", "data_pipelines") for file in (REPOSITORY / package).rglob("*.py"))
# The modules that make paths of texts, or use os.path, all the same. The list may only shrink.
REASONS = {
    "crab_jax/io/paths.py": "the one place",
    "crab_jax/io/buckets.py": "the cache on this machine's disk",
    "crab_jax/io/files.py": "the branch for disks, and temporary folders",
    "crab_jax/io/locks.py": "/proc",
    "crab_jax/io/bounds.py": "whether a text that looks like no path is one; paths on disks",
    "crab_jax/io/packaged.py": "files of the package",
    "crab_jax/aot/compile_cache.py": "a cache on this machine's disk",
    "crab_jax/aot/gpu.py": "the CUDA compiler of this machine",
    "crab_jax/parallel/distributed.py": "files of the package",
    "crab_jax/checkpoints/orbax.py": "the branch for disks",
    "crab_jax/checkpoints/run_steps.py": "the branch for disks",
    "crab_jax/training/metrics_log.py": "a temporary folder",
    "crab_jax/config.py": "--config is a file of Python",
    "data_pipelines/prepare.py": "a temporary folder",
    "data_pipelines/shards.py": "the branch for disks",
    "data_pipelines/index.py": "files of the package, and the branch for disks",
    "data_pipelines/shared.py": "a temporary file",
    "data_pipelines/sources/release.py": "the branch for disks",
    "data_pipelines/decoded.py": "the cache of decoded media, on this machine's disk",
    **dict.fromkeys(
        (f"data_pipelines/media/{name}.py" for name in ("container", "masks", "pictures", "sound", "video")),
        "media are files on a disk: `paths.local` has fetched them",
    ),
}


def makes_paths(file: Path) -> bool:
    """Whether a module calls Path(...) with more than constants, or anything of os.path."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("os.path."):
            return True
        made = isinstance(node, ast.Call) and ast.unparse(node.func) == "Path"
        if made and not all(isinstance(argument, ast.Constant) for argument in node.args):
            return True
    return False


def test_paths_are_made_in_one_place():
    found = {file.relative_to(REPOSITORY).as_posix() for file in SOURCES if makes_paths(file)}
    assert not found - REASONS.keys(), "use crab_jax.io.paths.at: Path and os.path make a folder 'gs:' of gs://b/x"
    assert not REASONS.keys() - found, "these need no exception any more"


@pytest.mark.parametrize("text", ["gs://bucket", "gs://bucket/a/b c", "s3://b/x"])
def test_a_bucket_is_a_path_where_buckets_are_taken(text):
    assert bounds.ANYWHERE.problem(text) == "" and paths.is_remote(text)
    assert str(bounds.path(text)) == text
    with pytest.raises(argparse.ArgumentTypeError, match="copy it to a folder"):
        bounds.PATH(text)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("gs:/bucket/x", "write gs://bucket/x"),
        ("s3:/b", "write s3://b"),
        ("gs://", "write gs://BUCKET/NAME"),
        ("hdfs://host/x", "mount the bucket"),
        ("https://host/x", "download it"),
        ("file:///x", "give the path itself"),
    ],
)
def test_what_is_no_path_is_refused_with_what_to_write(text, fix):
    assert fix in bounds.ANYWHERE.problem(text) and not paths.is_remote(text)


def flags_of(module: str) -> dict[str, bool]:
    """{flag, or name of a word, that takes a path: whether it takes a bucket} of a verb's parser."""
    flags = {}
    kinds = dict.fromkeys(("ANYWHERE", "ANY_PLACE", "path", "bounds.path", "_labels_at"), True)
    kinds |= dict.fromkeys(("PATH", "ANY_PATH"), False)
    for node in ast.walk(ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
            types = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "type"]
            if types and types[0] in kinds and isinstance(node.args[0], ast.Constant):
                flags[node.args[0].value] = kinds[types[0]]
    return flags


KEYS = ("data.root", "data.roots", "init_from", "tokenizer")
TABLE = {
    "crab_jax.evaluate": "crab_jax.evaluate",
    "crab_jax.predict": "crab_jax.predict",
    "crab_jax.compare": "crab_jax.compare",
    "crab_jax.inspect": "crab_jax.inspect",
    "crab_jax.report": "crab_jax.report",
    "crab_jax.compile": "crab_jax.compile",
    "crab_jax.convert": "crab_jax.convert.__main__",
    "crab_jax.demo": "crab_jax.tiny_world.demo",
    "crab_jax.stages": "crab_jax.tiny_world.stages",
    "crab_jax.recipe": "crab_jax.tiny_world.recipe",
    "crab_jax.warmup": "crab_jax.tiny_world.pretrain",
    "data_pipelines prepare": "data_pipelines.prepare",
    "data_pipelines index": "data_pipelines.index",
    "data_pipelines status": "data_pipelines.status",
    "data_pipelines validate": "data_pipelines.status",  # they share their flags
    "data_pipelines sample": "crab_jax.reports.record_page",
    "data_pipelines plan": "crab_jax.reports.input_plan",
    "data_pipelines own": "data_pipelines.own.verb",
    "data_pipelines.av_uie": "data_pipelines.av_uie.__main__",
    "data_pipelines.sources.scenes": "data_pipelines.sources.scenes",
    "data_pipelines.tokens": "data_pipelines.tokens",
}


def test_every_verb_with_a_path_is_in_the_table():
    modules = {".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in SOURCES}
    assert {module for module in modules if flags_of(module)} == set(TABLE.values())


def cells_of(verb: str) -> list[set[str]]:
    """The flags in the two cells of a verb's line in the documents."""
    lines = (REPOSITORY / "docs/training.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| `") and f"`{verb}`" in line.split("|")[1])
    return [set(re.findall(r"`(--[\w.-]+)`", cell)) for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("verb", TABLE)
def test_the_documents_say_which_flags_take_a_bucket(verb):
    flags = {flag: taken for flag, taken in flags_of(TABLE[verb]).items() if flag.startswith("--")}
    taken, refused = cells_of(verb)
    assert taken == {flag for flag, taken in flags.items() if taken}
    assert refused == {flag for flag, taken in flags.items() if not taken}


def test_the_keys_of_a_run_that_take_a_bucket():
    known = {**config.RUN_BOUNDS, **config.MIXTURE_BOUNDS, **config.DATA_BOUNDS}
    taken = {name for name, bound in known.items() if isinstance(bound, bounds.Place) and bound.buckets}
    assert taken == {"root", "init_from", "tokenizer"} and not known["cache_dir"].buckets
    assert known["roots"].fits("gs://b/x,s3://b/y") and not known["roots"].fits("http://b/x")
    flags, refused = cells_of("crab_jax.train")
    assert flags == {f"--{name}" for name in ("workdir", *(f"config.{key}" for key in KEYS))}
    assert refused == {"--config.data.cache_dir", "--config"}
