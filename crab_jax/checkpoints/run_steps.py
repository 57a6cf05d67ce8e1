"""The checkpoints of a run: asynchronous, atomic, verified, and restorable on another mesh."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from crab_jax.checkpoints import finite
from crab_jax.checkpoints.digests import (
    COPY_AGAIN,
    check_digests,
    check_match,
    hash_of,
    leaf_digests,
    plain,
    tell_unverified,
    tree_hash,
)
from crab_jax.checkpoints.models import FORMAT, MANIFEST, hashes_beside, read_manifest
from crab_jax.checkpoints.orbax import (
    COMMIT,
    finishing,
    first_line,
    in_plain_words,
    is_finished,
    load_orbax,
    orbax_path,
    quiet,
    telling_of_buckets,
    tree_metadata,
)
from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import need_room, remove_folder, write_whole
from crab_jax.io.structured import read_json

STEP_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file within each step; its `custom_metadata` is written by `save`
LEAST = 0.6  # minimal share of a tree's bytes that its compressed checkpoint takes


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


class RunCheckpoints:
    """The checkpoints of one run; the newest `keep` are kept."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = paths.at(folder) if paths.is_remote(folder) else Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        with quiet(), finishing(self.folder):  # Orbax warns of folders that are not steps
            self._steps = ocp.training.Checkpointer(
                orbax_path(self.folder), preservation_policy=ocp.training.preservation_policies.LatestN(keep)
            )
        self._frozen = ""  # hash of the frozen tree, once known
        self._saving: Any = None  # the step being written

    @property
    def latest(self) -> int | None:
        """Return the newest complete step, or None."""
        return max(steps_of(self.folder), default=None)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the description of the run from its start. Raises InputError when it cannot be read."""
        return read_manifest(self.folder, "copy the folder again, or start anew in another --workdir")

    def note(self, manifest: dict[str, Any]) -> None:
        """Write the manifest."""
        if jax.process_index() == 0:
            write_whole(str(self.folder / MANIFEST), json.dumps(manifest, indent=1))

    def note_description(self) -> None:
        """Record the hashes of the config and the tokenizer in the manifest."""
        manifest, files = self.manifest, hashes_beside(self.folder.parent)
        if manifest.get("files") != files:
            self.note(manifest | {"files": files})

    def save_frozen(self, frozen: Any, manifest: dict[str, Any]) -> None:
        """Write the frozen tree once, and the manifest that later restores are checked against."""
        self._set_foreign_aside()
        with finishing(self.folder), telling_of_buckets(self.folder):
            ocp.save(orbax_path(self.folder / "frozen"), frozen, overwrite=True)
        digests = leaf_digests(frozen)
        self._frozen = hash_of(digests)
        self.note(
            {
                "format": FORMAT,
                "frozen_hash": self._frozen,
                **manifest,
                "frozen": digests,
                "packages": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
            }
        )

    def load_frozen(self, wanted: Any) -> Any:
        """Return the frozen tree in the dtypes and shardings of `wanted`.

        Raises InputError when it differs from the tree that the run started with.
        """
        folder = self.folder / "frozen"
        check_match(wanted, tree_metadata(folder), str(folder))
        frozen = load_orbax(folder, wanted)
        # Runs of an earlier version have another hash under another name.
        kept, current = self.manifest.get("frozen_hash"), tree_hash(frozen)
        if {kept, self._frozen} - {None, "", current}:
            raise InputError(
                str(folder),
                "frozen_hash",
                "the frozen weights are not those that the run started with",
                "copy the folder again, or start anew in another --workdir",
            )
        self._frozen = current
        return frozen

    def need_room(self, train: Any, frozen: Any = None) -> None:
        """Raise InputError if the disk cannot hold the run: the frozen tree, if given, the kept steps and one more.

        Trees may be abstract.
        """
        if jax.process_index() == 0:
            steps = max(1, self._keep + 1 - len(steps_of(self.folder)))
            size = _tree_bytes(frozen or {}) + steps * _tree_bytes(train)
            need_room(
                str(self.folder),
                int(LEAST * size),
                f"a run of this size, with {self._keep} checkpoints and the next,",
                "--workdir",
            )

    def raise_failed(self) -> None:
        """Raise what has stopped the saving of a step, which else would be told when the next is saved."""
        if self._saving is not None:
            with contextlib.suppress(TimeoutError):  # it goes on
                with telling_of_buckets(self.folder):
                    self._saving.result(timeout=0)
                self._saving = None

    def save(self, step: int, train: Any) -> None:
        """Start writing one step in the background, with the digests of what is written and that of the frozen tree.

        Raises InputError for values that are not finite: nothing is written then, and the steps before stay.
        """
        try:
            finite.check(train, str(self.folder / str(step)))
        except InputError as error:
            self.wait()
            before = f"step {self.latest} before it is whole" if self.latest else "there is no step before it"
            raise InputError(
                error.where,
                error.field,
                f"{error.problem}; it is not saved, {before}",
                "start again with a lower optim.lr or larger optim.eps, in another --workdir",
            ) from error
        # force: by default Orbax drops a save while the previous one is being written.
        with telling_of_buckets(self.folder):
            self._saving = self._steps.save_checkpointables_async(
                step,
                {"train": train},
                force=True,
                custom_metadata={"step": step, "frozen_hash": self._frozen, "train": leaf_digests(train)},
            )

    def restore(self, train: Any) -> Any:
        """Return the newest undamaged step, with the shapes, dtypes and shardings of the given `train` tree.

        Newer damaged steps are renamed, with a warning. Raises the InputError of the newest step if all are damaged.
        """
        failed: dict[int, InputError] = {}
        for step in sorted(steps_of(self.folder), reverse=True):
            try:
                restored = self._restore(step, train)
                break
            except InputError as error:
                failed[step] = error
        else:
            raise next(iter(failed.values()))
        for number, damage in failed.items():
            aside = self._set_aside(str(number))
            if jax.process_index() == 0:
                print(
                    f"warning: {damage.where}: {damage.problem}; this step is set aside as {aside}, and the run goes "
                    f"on from step {step}",
                    file=sys.stderr,
                    flush=True,
                )
        self._set_foreign_aside()
        self._steps.reload()
        return restored

    def _restore(self, step: int, train: Any) -> Any:
        """Return one step. All processes of a run raise InputError if one of them does."""
        folder = self.folder / str(step)
        restored, error, kept = None, None, None
        try:
            kept = step_metadata(folder)
            check_match(plain(train), plain(tree_metadata(folder, "train")), str(folder))
            restored = in_plain_words(
                folder, lambda: self._steps.load_checkpointables(step, {"train": _abstract(train)})
            )
        except InputError as problem:
            error = problem
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(error is None)).all():
            error = error or InputError(str(folder), "", "cannot be read by another process", "read its output")
        if error is not None or restored is None:
            raise error or InputError(str(folder), "", "holds no train state", COPY_AGAIN)
        if kept:
            check_digests(kept["train"], restored["train"], str(folder))
            if kept["step"] != step:
                raise InputError(str(folder), "step", f"is step {kept['step']}", "give the folder its own name")
        else:
            tell_unverified(str(folder))
        finite.check(restored["train"], str(folder))
        self._frozen = kept["frozen_hash"] if kept else ""
        return restored["train"]

    def _set_aside(self, name: str) -> str:
        """Rename a folder or file among the steps to a name that no step has; return that name.

        In a bucket its objects are copied and deleted, its marker first.
        """
        number, old = 0, self.folder / name
        while (aside := self.folder / (f"{name}.damaged{number or ''}")).exists():
            number += 1
        multihost_utils.sync_global_devices(f"set {name} aside") if jax.process_count() > 1 else None
        if jax.process_index() == 0:
            if paths.is_remote(old):
                paths.at(old / COMMIT).unlink(missing_ok=True)
                paths.in_bucket(old).move(paths.in_bucket(aside))
            else:
                old.rename(aside)
        multihost_utils.sync_global_devices(f"{name} is set aside") if jax.process_count() > 1 else None
        renamed: str = aside.name
        return renamed

    def _set_foreign_aside(self) -> None:
        """Rename everything that has the name of a step but is none, which would block the saving of that step.

        In a bucket such a step was not finished: it is deleted.
        """
        steps = steps_of(self.folder)
        if paths.is_remote(self.folder):
            if jax.process_index() == 0:
                for path in [path for path in self.folder.iterdir() if path.name.isdecimal()]:
                    if int(path.name) not in steps:
                        remove_folder(path)
            multihost_utils.sync_global_devices("deleted unfinished steps") if jax.process_count() > 1 else None
            return
        for name in sorted(path.name for path in self.folder.iterdir() if path.name.isdecimal()):
            if name != str(int(name)) or int(name) not in steps:
                aside = self._set_aside(name)
                if jax.process_index() == 0:
                    print(f"warning: {self.folder / name} holds no step; it is set aside as {aside}", file=sys.stderr)

    def wait(self) -> None:
        """Block until all pending saves are on disk."""
        with telling_of_buckets(self.folder):
            self._steps.close()


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def steps_of(folder: Path) -> set[int]:
    """Return the steps in a run's `checkpoints/`, including damaged ones.

    Other entries with numeric names are left out.
    """
    return {
        int(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.isdecimal()
        and path.name == str(int(path.name))
        and is_finished(path)
        and ((path / "train").exists() or (path / STEP_METADATA).exists())
    }


def step_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata that `save` wrote for a step; None for a step of an older version. Raises InputError."""
    try:
        kept = read_json(str(folder / STEP_METADATA)).get("custom_metadata")
        if kept and not (
            isinstance(kept["train"], dict) and isinstance(kept["frozen_hash"], str) and isinstance(kept["step"], int)
        ):
            raise KeyError("train, step or frozen_hash")
        return kept or None
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            str(folder / STEP_METADATA), "", f"cannot be read ({first_line(error)})", COPY_AGAIN
        ) from error
