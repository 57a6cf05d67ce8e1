"""Import of released PyTorch files into an Orbax checkpoint, with a report.

The import is strict: every key of every file is read or listed as ignored, and every parameter is filled or listed as
drawn. Tensors are memory-mapped and written one by one, so neither the model nor a large stack of its layers is ever in
memory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax.checkpoints import finite
from crab_jax.checkpoints.models import IMPORTED, PACKED, note_model
from crab_jax.checkpoints.orbax import Streamed, save_streamed
from crab_jax.config import RunConfig, derived_data, refuse_no_file, resolve
from crab_jax.convert import released, torch_file
from crab_jax.convert.keymap import Rule, permute, split_target
from crab_jax.convert.llama import vocab_rules
from crab_jax.convert.released import COMPONENTS, EMBED, HEAD, Choices, Source
from crab_jax.defaults import released as paper_defaults
from crab_jax.io import paths, stored_tensors
from crab_jax.io.errors import InputError
from crab_jax.io.files import need_room, refuse_stand_in, replaced, work_folder, write_whole
from crab_jax.io.progress import Progress
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import Llama
from crab_jax.models.mask_decoder import SegModule
from crab_jax.models.qformer import QFormer
from crab_jax.models.quirks import PRESETS
from crab_jax.runs import run_params
from data_pipelines.tokens import Tokenizer

REPORT = "import_report.json"
EMBEDDING, KERNEL = (rule.target for rule in vocab_rules(at="llama/"))
NEW_ROWS = {EMBEDDING: "embed_tokens.new_rows", KERNEL: "lm_head.new_rows"}


@dataclasses.dataclass(frozen=True)
class Files:
    """The files to import.

    crab: Crab's own files in loading order. tokenizer: by default that of the LLaMA directory. position_buffers,
    token_rows: .npz (or torch) files with arrays that the released files lack; state: prefix of the buffers in a file
    that holds several. fresh: components to draw from `seed` because no file holds them.
    """

    clip: Path
    llama: Path
    beats: Path
    crab: tuple[Path, ...]
    tokenizer: Path | None = None
    position_buffers: Path | None = None
    token_rows: Path | None = None
    state: str = ""
    fresh: tuple[str, ...] = ()
    seed: int = 0


_Parts = Iterable[tuple[tuple[int, ...], np.ndarray]]  # see `Streamed`


class Part(NamedTuple):
    """One tensor of a file and its position in the parameter tree."""

    path: str
    at: tuple[int, ...]
    source: Source
    rule: Rule

    @property
    def name(self) -> str:
        """Return the file and key, for messages."""
        return f"{self.source.where}: {self.rule.source}"

    def load(self) -> np.ndarray:
        """Return the tensor in the layout of this project's parameters, as a view of the file."""
        return permute(self.source.tensors[self.rule.source], self.rule.layout)


def import_weights(
    files: Files, out: Path, choices: Choices | None = None, config: RunConfig | None = None
) -> dict[str, Any]:
    """Write the checkpoint into `out` and return the report, which is also written there. Raises InputError.

    config: the run config that the checkpoint records (default: that of configs/finetune.py); its sizes and preset are
    replaced by those of the files.
    """
    choices = choices or Choices()
    for name in files.fresh:
        if name not in COMPONENTS:
            raise InputError("--fresh", name, "is no component", f"use {', '.join(COMPONENTS)}")
    for name in (PACKED, "checkpoints"):
        if (out / name).exists():
            raise InputError(str(out), "--out", f"holds another model ({name})", "give another folder")
    base = released.base_sources(files.clip, files.llama, files.beats)
    crab = [released.crab_source(path) for path in files.crab]
    given, passed = released.resolve(crab)
    tokenizer = _tokenizer(files, base["llama"])
    cfg = released.read_config(files.clip, files.llama, base["beats"], given, tokenizer.vocab_size, choices)
    shapes = _shapes(cfg)
    parts, used = _assign_tensors(base, given, cfg, files.fresh, shapes)
    unexplained, ignored = _unread([*base.values(), *crab], used, passed)
    vocab, vocab_notes = _vocabulary(files, base["llama"], given, cfg, tokenizer.base)
    extra, notes = _position_buffers(files, given, shapes)
    drawn = {
        path for path in shapes if path not in {part.path for part in parts} and path not in vocab and path not in extra
    }
    unfilled = [path for path in drawn if not _may_be_drawn(path, files.fresh)]
    _check_explained(unexplained, unfilled, files)
    for path in sorted(drawn):  # the order of a set differs between processes
        notes[path] = f"drawn from seed {files.seed}"
    extra |= _draw(cfg, files.seed, drawn)

    broken: dict[str, finite.Faults] = {}
    leaves = _leaves(parts, vocab, extra, shapes, cfg, files.seed, broken)

    report = {
        "sources": {
            source.where: {
                "keys": len(source.tensors),
                "used": len(used.get(source.where, ())),
                "ignored": dict(Counter(ignored[source.where].values())),
                "ignored_keys": ignored[source.where],
            }
            for source in [*base.values(), *crab]
        },
        "parameters": {
            "leaves": len(shapes),
            "from_files": len(shapes) - len(notes),
            "not_from_weight_files": notes | vocab_notes,
            "dtypes": dict(Counter(leaf.dtype.name for leaf in leaves.values())),
        },
        "lora_heads": cfg.lora.heads,
        "queries": {"visual": cfg.visual.queries, "audio": cfg.audio.queries, "masks": cfg.seg.queries},
        "compat": choices.compat,
        "seed": files.seed,
        "sizes": _plain(cfg),
    }
    need_room(work_folder(out), sum(leaf.nbytes for leaf in leaves.values()), "the model")
    with replaced(out) as new:
        digests = save_streamed(new / IMPORTED, _with_progress(leaves))
        finite.refuse(broken, "import")
        write_whole(new / REPORT, json.dumps(report, indent=1))
        write_whole(new / "config.json", json.dumps(_run_config(cfg, choices, config).to_dict(), indent=1))
        tokenizer.save(new)
        note_model(new, digests)
    return report


@functools.cache
def _shapes(cfg: CrabConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its '/'-joined path."""
    flat = traverse_util.flatten_dict(nn.unbox(run_params.abstract_params(cfg.build())), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _tokenizer(files: Files, llama: Source) -> Tokenizer:
    tokenizer = Tokenizer.load(files.tokenizer or files.llama)
    if "model.embed_tokens.weight" not in llama.tensors:
        raise InputError(llama.where, "model.embed_tokens.weight", "is missing", "give a LLaMA directory to --llama")
    rows = len(llama.tensors["model.embed_tokens.weight"])
    if tokenizer.base != rows:
        raise InputError(
            str(files.tokenizer or files.llama),
            "vocabulary",
            f"has {tokenizer.base} tokens, the embedding has {rows} rows",
            "give the tokenizer of this model",
        )
    return tokenizer


def _assign_tensors(
    base: Mapping[str, Source],
    given: Mapping[str, Source],
    cfg: CrabConfig,
    fresh: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[list[Part], dict[str, set[str]]]:
    """Return a Part for every tensor but the vocabulary and position matrices, and the keys used of each file.

    Raises InputError for missing tensors and wrong shapes.
    """
    wanted: list[tuple[Source | None, Rule]] = [
        (source, rule)
        for name, source in base.items()
        for rule in released.base_rules(cfg)[name]
        if rule.target not in (EMBEDDING, KERNEL)
    ]
    for component, rules in released.crab_rules(cfg).items():
        if component in released.present(given) or component not in fresh:
            wanted += [(given.get(rule.source), rule) for rule in rules]
    parts = []
    used: dict[str, set[str]] = {source.where: set() for source in [*base.values(), *given.values()]}
    missing: list[tuple[str, str]] = []  # (file, key)
    from_crab = ", ".join(sorted({source.where for source in given.values()})) or "--crab"
    for source, rule in wanted:
        if source is None or rule.source not in source.tensors:
            missing.append((source.where if source else from_crab, rule.source))
            continue
        path, index = split_target(rule.target)
        part = Part(path, index, source, rule)
        expected, shape = shapes[path][len(index) :], part.load().shape
        if tuple(shape) != expected:
            raise InputError(
                source.where,
                rule.source,
                f"has shape {tuple(source.tensors[rule.source].shape)} "
                f"({tuple(shape)} as {rule.target}), the model wants {expected}",
                "give files of one model, or the options that match them",
            )
        parts.append(part)
        used[source.where].add(rule.source)
    for key in (EMBED, HEAD, *(rule.source for rule in released.buffer_rules())):
        if key in given:
            used[given[key].where].add(key)
    for rule in vocab_rules():
        if rule.source not in base["llama"].tensors:
            missing.append((base["llama"].where, rule.source))
        used[base["llama"].where].add(rule.source)
    if missing:
        unused = [
            key
            for source in {s.where: s for s in [*base.values(), *given.values()]}.values()
            for key in source.tensors
            if not any(key in keys for keys in used.values())
            and not any(re.fullmatch(pattern, key) for pattern in source.ignored)
        ]
        absent = sorted(set(COMPONENTS) - released.present(given) - set(fresh))
        fix = (
            f"give the files that hold {', '.join(absent)}, or --fresh {' '.join(absent)}"
            if absent
            else "give the files that hold them"
        )
        unused_keys = f"; {len(unused)} keys of the files have no use: {unused[:3]}" if unused else ""
        keys = [key for _, key in missing]
        raise InputError(
            ", ".join(dict.fromkeys(where for where, _ in missing)),
            keys[0],
            f"{len(keys)} tensors are missing: {keys[:3]}{unused_keys}",
            fix,
        )
    _check_stacks(parts)
    return parts, used


def _check_stacks(parts: Sequence[Part]) -> None:
    """Raise InputError unless all layers of a stacked leaf share a dtype."""
    first: dict[str, Part] = {}
    for part in parts:
        other = first.setdefault(part.path, part)
        dtype, expected = (p.source.tensors[p.rule.source].dtype for p in (part, other))
        if dtype != expected:
            raise InputError(
                part.source.where,
                part.rule.source,
                f"is {dtype}, its sibling {other.rule.source} is {expected}",
                "give files of one model",
            )


def _unread(
    sources: Sequence[Source], used: Mapping[str, set[str]], passed: Mapping[str, Mapping[str, str]]
) -> tuple[list[tuple[str, str]], dict[str, dict[str, str]]]:
    """Return ((file, key) of unexplained keys, {file: {ignored key: reason}})."""
    unexplained = []
    ignored: dict[str, dict[str, str]] = {}
    for source in sources:
        reasons = dict(passed.get(source.where, {}))
        for key in source.tensors:
            if key in used.get(source.where, ()) or key in reasons:
                continue
            why = next((why for pattern, why in source.ignored.items() if re.fullmatch(pattern, key)), None)
            if why is None:
                unexplained.append((source.where, key))
            else:
                reasons[key] = why
        ignored[source.where] = reasons
    return unexplained, ignored


def _may_be_drawn(path: str, fresh: Sequence[str]) -> bool:
    component = "lora" if "/lora_" in path else path.split("/")[0]
    return component in fresh or path.endswith("positional_encoding_gaussian_matrix")


def _check_explained(unexplained: Sequence[tuple[str, str]], unfilled: Sequence[str], files: Files) -> None:
    if not unexplained and not unfilled:
        return
    where, key = unexplained[0] if unexplained else (", ".join(map(str, files.crab)), unfilled[0])
    raise InputError(
        where,
        key,
        f"{len(unexplained)} keys have no use: {[key for _, key in unexplained[:5]]}; "
        f"{len(unfilled)} parameters have no source: {sorted(unfilled)[:5]}",
        "give files of one model, or report the keys if the release has changed",
    )


def read_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """Return arrays by name from an .npz, .safetensors or torch file. Raises InputError."""
    if path.suffix == ".npz":
        refuse_stand_in(path)
        try:
            with np.load(paths.local(path), allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # NumPy raises its own errors and those of zip and pickle
            raise InputError(str(path), "", f"cannot be read ({error})", "give an .npz of plain arrays") from error
    return stored_tensors.read_safetensors(path) if path.suffix == ".safetensors" else torch_file.read(path)


def _position_buffers(
    files: Files, given: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the random position matrices and notes on their origin; empty when they must be drawn."""
    rules = released.buffer_rules()
    if files.position_buffers is None:
        if not all(rule.source in given for rule in rules):
            return {}, {}
        return {rule.target: given[rule.source].tensors[rule.source] for rule in rules}, {}
    arrays, where = read_arrays(files.position_buffers), str(files.position_buffers)
    buffers, notes = {}, {}
    for rule in rules:
        suffix = rule.source.removeprefix(released.SEG)
        names = [name for name in arrays if name.endswith(suffix) and name.startswith(files.state)]
        if len(names) != 1:
            problem = f"{len(names)} arrays match: {names}" if names else f"no array matches; it has {sorted(arrays)}"
            raise InputError(where, f"{files.state}*{suffix}", problem, "name one with --state PREFIX")
        value = np.asarray(arrays[names[0]])
        if value.shape != shapes[rule.target]:
            raise InputError(
                where,
                names[0],
                f"has shape {value.shape}, the model wants {shapes[rule.target]}",
                "give the buffers of this model",
            )
        buffers[rule.target], notes[rule.target] = value, f"{where}: {names[0]}"
    return buffers, notes


def _vocabulary(
    files: Files, llama: Source, given: Mapping[str, Source], cfg: CrabConfig, base: int
) -> tuple[dict[str, list[tuple[str, Any]]], dict[str, str]]:
    """Return the row blocks of the embedding and output matrix, and notes on rows that no weight file holds.

    Each block is (origin, array); the array is None for rows to draw.
    """
    added = cfg.llama.vocab_size - base
    rows: dict[str, list[tuple[str, Any]]] = {}
    notes = {}
    supplied = read_arrays(files.token_rows) if files.token_rows else {}
    for whole, rule in zip((EMBED, HEAD), vocab_rules(at="llama/"), strict=True):
        path = rule.target
        if whole in given:
            source, key, pieces = given[whole], whole, cfg.llama.vocab_size
        else:
            source, key, pieces = llama, rule.source, base
        value = source.tensors[key]
        if value.shape != (pieces, cfg.llama.hidden):
            raise InputError(
                source.where,
                key,
                f"has shape {value.shape}, the model wants {(pieces, cfg.llama.hidden)}",
                "give files of one model and its tokenizer",
            )
        rows[path] = [(source.where, value)]
        if pieces == base:
            name = NEW_ROWS[path]
            new = supplied.get(name)
            if files.token_rows and new is None:
                raise InputError(
                    str(files.token_rows),
                    name,
                    f"is missing; the file has {sorted(supplied)}",
                    "give an .npz with embed_tokens.new_rows and lm_head.new_rows",
                )
            if new is not None and new.shape != (added, cfg.llama.hidden):
                raise InputError(
                    str(files.token_rows),
                    name,
                    f"has shape {new.shape}, the model wants {(added, cfg.llama.hidden)}",
                    "give the rows of the added tokens",
                )
            rows[path].append(("", new))
            notes[f"{path} rows {base}..{base + added - 1}"] = (
                f"{files.token_rows}: {name}" if new is not None else f"drawn from seed {files.seed}"
            )
    return rows, notes


def _draw(cfg: CrabConfig, seed: int, leaves: set[str]) -> dict[str, np.ndarray]:
    """Return these leaves of freshly initialised modules; nothing else is computed."""
    drawn: dict[str, np.ndarray] = {}

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    features = shape(1, cfg.seg.grid**2, cfg.seg.image_dim)
    modules: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "vl_projector": (QFormer(cfg.visual), (shape(1, 1, cfg.visual.in_dim),)),
        "al_projector": (QFormer(cfg.audio), (shape(1, 1, cfg.audio.in_dim),)),
        "seg_module": (SegModule(cfg.seg), (shape(1, 6, cfg.seg.llm_dim), (features, features))),
        "llama": (Llama(cfg.llama, cfg.lora), (jax.ShapeDtypeStruct((1, 2), jnp.int32),)),
    }
    for number, (name, (module, inputs)) in enumerate(modules.items()):
        wanted = tuple(sorted(path for path in leaves if path.startswith(f"{name}/")))
        if wanted:
            rng = jax.random.fold_in(jax.random.key(seed), number)
            drawn |= {path: np.asarray(leaf) for path, leaf in _init(rng, name, module, inputs, wanted).items()}
    return drawn


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _init(
    rng: jax.Array, name: str, module: nn.Module, inputs: tuple[Any, ...], wanted: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Return the wanted leaves of one module, by their paths below `name`."""
    tree = nn.unbox(module.lazy_init(rng, *inputs, method=_whole_llama if name == "llama" else None)["params"])
    flat = traverse_util.flatten_dict({name: tree}, sep="/")
    return {path: flat[path] for path in wanted}


def _whole_llama(llama: Llama, tokens: jax.Array) -> jax.Array:
    """Use every parameter of the language model, so that initialisation creates them all."""
    hidden, _ = llama(llama.embed(tokens), jnp.zeros(tokens.shape, jnp.int32))
    return llama.logits(hidden)


def _leaves(
    parts: Sequence[Part],
    vocab: Mapping[str, list[tuple[str, Any]]],
    extra: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    cfg: CrabConfig,
    seed: int,
    broken: dict[str, finite.Faults],
) -> dict[str, Streamed]:
    """Return every leaf to write, each loading its tensors when written; non-finite values are noted in `broken`."""

    def checked(name: str, value: np.ndarray) -> np.ndarray:
        if fault := finite.faults(value):
            broken[name] = fault
        return value

    def parts_of(stack: Sequence[Part]) -> _Parts:
        return ((part.at, checked(part.name, part.load())) for part in stack)

    def drawn(path: str, value: np.ndarray) -> _Parts:
        return [((), checked(path, value))]

    def table(path: str, pieces: list[tuple[str, Any]]) -> _Parts:
        return [((), checked(f"{pieces[0][0]}: {path}", _table(path, pieces, cfg, seed)))]

    stacks: dict[str, list[Part]] = {}
    for part in parts:
        stacks.setdefault(part.path, []).append(part)
    leaves = {
        path: Streamed(shapes[path], stack[0].load().dtype, len(stack[0].at), functools.partial(parts_of, stack))
        for path, stack in stacks.items()
    }
    for path, value in extra.items():
        leaves[path] = Streamed(shapes[path], value.dtype, 0, functools.partial(drawn, path, value))
    for path, pieces in vocab.items():
        leaves[path] = Streamed(shapes[path], pieces[0][1].dtype, 0, functools.partial(table, path, pieces))
    return leaves


def _with_progress(leaves: Mapping[str, Streamed]) -> dict[str, Streamed]:
    """Return the same leaves with a progress line for their writing."""
    written = Progress(IMPORTED, sum(leaf.nbytes for leaf in leaves.values()), unit="GB", scale=1e9)

    def watched(leaf: Streamed) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for index, part in leaf.parts():
            yield index, part
            written.add(part.nbytes)

    return {path: dataclasses.replace(leaf, parts=functools.partial(watched, leaf)) for path, leaf in leaves.items()}


def _table(path: str, pieces: Sequence[tuple[str, Any]], cfg: CrabConfig, seed: int) -> np.ndarray:
    """Assemble the embedding or output matrix from its row blocks, with zeros for the padding of the vocabulary."""
    dtype, at = pieces[0][1].dtype, 0
    table = np.zeros((cfg.llama.padded_vocab, cfg.llama.hidden), dtype)
    for _, piece in pieces:
        if piece is None:  # the added tokens' rows of a fresh model
            fresh = _draw(cfg, seed, {path})[path]
            piece = (fresh.T if path == KERNEL else fresh)[at : cfg.llama.vocab_size]
        table[at : at + len(piece)] = piece.astype(dtype)
        at += len(piece)
    return table.T if path == KERNEL else table


def _plain(cfg: Any) -> Any:
    """Convert a config dataclass to JSON types; other values become text."""
    if dataclasses.is_dataclass(cfg):
        return {f.name: _plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    return cfg if isinstance(cfg, str | int | float | bool) else list(cfg) if isinstance(cfg, tuple) else str(cfg)


def _run_config(cfg: CrabConfig, choices: Choices, config: RunConfig | None) -> RunConfig:
    """Return the run config with these sizes."""
    config = config or resolve(paper_defaults())
    compat = PRESETS[choices.compat]
    return dataclasses.replace(
        config,
        model_name="crab_7b",
        compat=choices.compat,
        model=cfg,
        data=dataclasses.replace(config.data, **derived_data(cfg, compat)),
        loss=dataclasses.replace(config.loss, reduction=compat.mask_loss_reduction),
    )


def load_run_config(file: Path) -> RunConfig:
    """Return the resolved `get_config()` of a config file. Raises InputError."""
    refuse_no_file(file)
    spec = importlib.util.spec_from_file_location("run_config", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(str(file), "--config", "is no Python config file", "give a file of configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a config file may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(str(file), "--config", f"cannot be run ({reason:.200})", "give a file of configs/") from error
    return resolve(config)


def describe(report: Mapping[str, Any]) -> str:
    """Format the report as a few lines."""
    lines = []
    for where, source in report["sources"].items():
        lines.append(f"{where}: {source['used']} of {source['keys']} keys used")
        lines += [f"  ignored {count}: {why}" for why, count in source["ignored"].items()]
    parameters = report["parameters"]
    lines.append(
        f"parameters: {parameters['leaves']} leaves, {parameters['from_files']} filled from the files; dtypes "
        + ", ".join(f"{name} x{count}" for name, count in parameters["dtypes"].items())
    )
    drawn: dict[str, list[str]] = {}
    for path, origin in parameters["not_from_weight_files"].items():
        drawn.setdefault(origin, []).append(path)
    lines += [
        f"  {origin}: {', '.join(leaves[:4])}" + (f" and {len(leaves) - 4} more" if len(leaves) > 4 else "")
        for origin, leaves in drawn.items()
    ]
    queries = report["queries"]
    lines.append(
        f"LoRA heads {report['lora_heads']}; queries: visual {queries['visual']}, audio {queries['audio']}, "
        f"masks {queries['masks']}; compat {report['compat']}; seed {report['seed']}"
    )
    return "\n".join(lines)
