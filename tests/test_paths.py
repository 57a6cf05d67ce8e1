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
DISK_ONLY = "its verb refuses buckets"
# The modules that make paths of texts, or use os.path, all the same. The list may only shrink.
REASONS = {
    "crab_jax/io/paths.py": "the one place",
    "crab_jax/io/buckets.py": "the cache on this machine's disk",
    "crab_jax/io/files.py": "the branch for disks, and temporary folders",
    "crab_jax/io/locks.py": "/proc",
    "crab_jax/io/bounds.py": "whether a text that looks like no path is one; paths on disks",
    "crab_jax/io/packaged.py": "files of the package",
    "crab_jax/aot/compile_cache.py": "a cache on this machine's disk",
    "crab_jax/parallel/distributed.py": "files of the package",
    "crab_jax/checkpoints/orbax.py": "the branch for disks",
    "crab_jax/checkpoints/run_steps.py": "the branch for disks",
    "crab_jax/training/metrics_log.py": "a temporary folder",
    "crab_jax/config.py": "--config is a file of Python",
    "data_pipelines/prepare.py": "a temporary folder",
    "data_pipelines/shards.py": "the branch for disks",
    "data_pipelines/index.py": "files of the package, and the branch for disks",
    "data_pipelines/shared.py": "a temporary file",
    "data_pipelines/decoded.py": "the cache of decoded media, on this machine's disk",
    **dict.fromkeys(
        (f"data_pipelines/media/{name}.py" for name in ("container", "masks", "pictures", "sound", "video")),
        "media are files on a disk: `paths.local` has fetched them",
    ),
    **dict.fromkeys(
        (
            "crab_jax/reports/clip_page.py",
            "crab_jax/tiny_world/demo.py",
            "crab_jax/tiny_world/stages.py",
            "crab_jax/reports/record_page.py",
            "crab_jax/convert/torch_file.py",
            "crab_jax/convert/torch_writer.py",
            "data_pipelines/av_uie/__main__.py",
            "data_pipelines/av_uie/annotate.py",
            "data_pipelines/av_uie/released.py",
            "data_pipelines/examine.py",
            "data_pipelines/own/files.py",
            "data_pipelines/own/verb.py",
            "data_pipelines/sources/release.py",
            "data_pipelines/sources/scene_media.py",
            "data_pipelines/sources/scenes.py",
            "data_pipelines/status.py",
            "data_pipelines/tokens.py",
            "data_pipelines/validate.py",
        ),
        DISK_ONLY,
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
    with pytest.raises(argparse.ArgumentTypeError, match="copy it to a folder"):
        bounds.path(text)


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
    kinds = {"ANYWHERE": True, "ANY_PLACE": True} | dict.fromkeys(("PATH", "ANY_PATH", "path", "bounds.path"), False)
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
    "crab_jax.inspect": "crab_jax.inspect",
    "crab_jax.report": "crab_jax.report",
    "data_pipelines prepare": "data_pipelines.prepare",
    "data_pipelines index": "data_pipelines.index",
    "crab_jax.compile": "crab_jax.compile",
}


@pytest.mark.parametrize("verb", TABLE)
def test_the_documents_say_which_flags_take_a_bucket(verb):
    line = next(line for line in (REPOSITORY / "docs/training.md").read_text().splitlines() if f"| `{verb}" in line)
    cells = [set(re.findall(r"`(--[\w.-]+)`", cell)) for cell in line.strip("|").split("|")[1:]]
    flags = flags_of(TABLE[verb])
    assert flags, "the parser is read"
    assert cells[0] == {flag for flag, taken in flags.items() if taken}
    assert cells[1] == {flag for flag, taken in flags.items() if not taken}


def test_the_keys_of_a_run_that_take_a_bucket():
    known = {**config.RUN_BOUNDS, **config.MIXTURE_BOUNDS, **config.DATA_BOUNDS}
    taken = {name for name, bound in known.items() if isinstance(bound, bounds.Place) and bound.buckets}
    assert taken == {"root", "init_from", "tokenizer"} and not known["cache_dir"].buckets
    assert known["roots"].fits("gs://b/x,s3://b/y") and not known["roots"].fits("http://b/x")
    line = next(
        line for line in (REPOSITORY / "docs/training.md").read_text().splitlines() if "| `crab_jax.train`" in line
    )
    flags, refused = (set(re.findall(r"`(--[\w.-]+)`", cell)) for cell in line.strip("|").split("|")[1:])
    assert flags == {f"--{name}" for name in ("workdir", *(f"config.{key}" for key in KEYS))}
    assert refused == {"--config.data.cache_dir", "--config"}


@pytest.mark.parametrize(
    "module",
    [
        "crab_jax.compile",
        "crab_jax.convert.__main__",
        "data_pipelines.status",
        "data_pipelines.own.verb",
        "data_pipelines.av_uie.__main__",
        "data_pipelines.sources.scenes",
        "data_pipelines.tokens",
        "crab_jax.reports.record_page",
        "crab_jax.tiny_world.demo",
        "crab_jax.tiny_world.stages",
        "crab_jax.tiny_world.recipe",
        "crab_jax.tiny_world.pretrain",
    ],
)
def test_the_other_commands_take_no_bucket(module):
    flags = flags_of(module)
    assert flags and not any(flags.values())
