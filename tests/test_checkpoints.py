"""Checkpoints restore exactly, and refuse what does not fit."""

import json
import logging
import os
import shutil
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import optim
from crab_jax.checkpoints import digests, models, orbax, run_steps, stored
from crab_jax.io.errors import InputError
from data_pipelines.tokens import Tokenizer

TRAINABLE = {"q": {"w": jnp.arange(6.0).reshape(2, 3)}}
FROZEN = {"llama": {"w": jnp.ones(3, jnp.bfloat16)}}


def train_tree():
    tx = optim.optimizer(optim.OptimConfig(), 10)
    return {"step": jnp.int32(7), "trainable": TRAINABLE, "opt": tx.init(TRAINABLE)}


@pytest.fixture
def saved(tmp_path):
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    run.save_frozen(FROZEN, {"lora_heads": 3})
    run.save(7, train_tree())
    run.wait()
    return tmp_path


def test_restore_gives_the_state(saved):
    run = run_steps.RunCheckpoints(saved / "checkpoints")
    assert run.latest == 7
    restored = run.restore(jax.tree.map(jnp.zeros_like, train_tree()))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, train_tree()))


def test_frozen_weights_that_are_not_those_of_the_start_are_refused(saved):
    run = run_steps.RunCheckpoints(saved / "checkpoints")
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), FROZEN)
    assert jax.tree.all(jax.tree.map(np.array_equal, run.load_frozen(wanted), FROZEN))
    other = run_steps.RunCheckpoints(saved / "other")
    other.save_frozen({"llama": {"w": jnp.zeros(3, jnp.bfloat16)}}, {})
    (saved / "checkpoints" / "frozen").rename(saved / "away")
    (saved / "other" / "frozen").rename(saved / "checkpoints" / "frozen")
    with pytest.raises(InputError, match="not those that the run started with"):
        run.load_frozen(wanted)


@pytest.mark.parametrize("kind", ["run", "packed"])
def test_parameters_are_read_into_the_wanted_dtypes_and_shardings_and_only_those(saved, kind):
    if kind == "packed":
        models.save_packed(saved / "packed", TRAINABLE | {"llama": {"w": np.ones(3, np.float32)}}, {})
    there = stored.stored_params(saved if kind == "run" else saved / "packed")
    assert jax.tree.map(lambda x: x.shape, there.shapes) == {"q": {"w": (2, 3)}, "llama": {"w": (3,)}}
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    read = there.load({"q": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16, sharding=where)}})
    assert read["q"]["w"].sharding == where and read["q"]["w"].dtype == jnp.bfloat16 and "llama" not in read
    np.testing.assert_array_equal(read["q"]["w"], TRAINABLE["q"]["w"])


def test_load_params_merges_frozen_and_trainable_with_their_dtypes(saved):
    params = stored.load_params(saved)
    assert params["llama"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["q"]["w"], TRAINABLE["q"]["w"])


def test_another_shape_is_refused_by_name(saved):
    run = run_steps.RunCheckpoints(saved / "checkpoints")
    wrong = train_tree()
    wrong["trainable"] = {"q": {"w": jnp.zeros((2, 4))}}
    with pytest.raises(InputError, match=r"trainable/q/w.*\(2, 3\).*\(2, 4\)"):
        run.restore(wrong)


def test_mismatch_lists_both_directions():
    lines = digests.describe_mismatch({"a": np.zeros(2), "b": np.zeros(1)}, {"b": np.zeros(3), "c": np.zeros(1)})
    assert len(lines) == 3 and "a: missing" in lines[0] and "c: unknown" in lines[1] and "(3,)" in lines[2]


def test_packed_round_trip_and_damage(tmp_path):
    models.save_packed(tmp_path, {"a": {"w": np.float32([0.5, 2])}, "n": np.int32([3])}, {"model": "tiny"}, np.float16)
    tree = stored.load_params(tmp_path)
    assert tree["a"]["w"].dtype == np.float32 and tree["n"].dtype == np.int32
    np.testing.assert_array_equal(tree["a"]["w"], [0.5, 2])
    file = tmp_path / models.PACKED
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        stored.load_params(tmp_path)


def streamed(array, stacked):
    indices = list(np.ndindex(array.shape[:stacked]))
    return orbax.Streamed(array.shape, array.dtype, stacked, lambda: ((i, array[i]) for i in indices[::-1]))


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A tree written part by part, in chunks far smaller than its leaves."""
    monkeypatch.setattr(orbax, "CHUNK", 2**12)
    rng = np.random.default_rng(0)
    tree = {
        "kernel": rng.normal(size=(3, 64, 80)).astype(jnp.bfloat16),
        "b": {"head": rng.normal(size=(2, 3, 32, 40)), "n": np.int32([3])},
    }
    orbax.save_streamed(
        tmp_path / models.IMPORTED,
        {
            "kernel": streamed(tree["kernel"], 1),
            "b/head": streamed(tree["b"]["head"].astype(np.float16), 2),
            "b/n": streamed(tree["b"]["n"], 0),
        },
    )
    tree["b"]["head"] = tree["b"]["head"].astype(np.float16)
    return tmp_path, tree


def test_a_streamed_tree_restores_bit_for_bit(imported):
    folder, tree = imported
    assert digests.tree_hash(stored.load_params(folder)) == digests.tree_hash(tree)


@pytest.mark.parametrize("chunk", [2**8, 2**25])  # smaller and larger than the leaves
def test_a_streamed_leaf_has_the_digest_of_the_whole_array(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(orbax, "CHUNK", chunk)
    tree = {"w": np.arange(240, dtype=np.float32).reshape(2, 3, 40), "n": np.int32([3])}
    sums = orbax.save_streamed(tmp_path / "params", {"w": streamed(tree["w"], 2), "n": streamed(tree["n"], 0)})
    assert sums == digests.leaf_digests(tree)


def test_a_streamed_leaf_is_stored_in_chunks_that_a_shard_can_be_read_from(imported):
    folder, _ = imported
    found = stored.ocp.metadata(orbax.orbax_path(folder) / models.IMPORTED).metadata
    for leaf, stacked in ((found["kernel"], 1), (found["b"]["head"], 2)):
        chunk = leaf.storage_metadata.chunk_shape
        assert chunk[:stacked] == (1,) * stacked and np.prod(chunk) * leaf.dtype.itemsize <= orbax.CHUNK


def test_only_one_part_of_a_large_leaf_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "CHUNK", 2**20)
    parts, side = 16, 1024

    def measured():
        for i in range(parts):
            assert tracemalloc.get_traced_memory()[0] < 4 * side**2 * 4, "parts pile up"
            yield (i,), np.full((side, side), i, np.float32)

    tracemalloc.start()
    try:
        orbax.save_streamed(
            tmp_path / models.IMPORTED, {"w": orbax.Streamed((parts, side, side), np.dtype(np.float32), 1, measured)}
        )
    finally:
        tracemalloc.stop()
    assert stored.load_params(tmp_path)["w"][:, 0, 0].tolist() == list(range(parts))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([((0,), np.zeros(2, np.float32))], "missing"),
        ([((0,), np.zeros(2, np.float32))] * 2, "part"),
        ([((0,), np.zeros(3, np.float32)), ((1,), np.zeros(2, np.float32))], r"part \(0,\)"),
        ([((0,), np.zeros(2, np.float16)), ((1,), np.zeros(2, np.float32))], "float16"),
    ],
)
def test_parts_that_do_not_make_the_leaf_leave_no_checkpoint(parts, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        orbax.save_streamed(
            tmp_path / models.IMPORTED, {"w": orbax.Streamed((2, 2), np.dtype(np.float32), 1, lambda: parts)}
        )
    with pytest.raises(InputError, match="neither"):
        stored.load_params(tmp_path)


def test_a_damaged_imported_model_is_named(imported):
    folder, _ = imported
    for file in folder.rglob("ocdbt.process_0/d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match="params.*cannot be read"):
        stored.load_params(folder)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a training run nor an imported or packed model"):
        stored.load_params(tmp_path)


def test_hash_sees_names_values_and_dtypes():
    base = digests.tree_hash({"a": np.zeros(2, np.float32)})
    assert base == digests.tree_hash({"a": jnp.zeros(2)})
    others = [{"b": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.int32)}]
    assert all(base != digests.tree_hash(tree) for tree in others)


def test_a_run_begins_where_its_checkpoints_have_room(tmp_path, monkeypatch):
    saved = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    tree = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 1, 10**8, 0, 7_000_000, 0, 0, 0, 0, 255)))
        with pytest.raises(InputError, match=r"\[--workdir\]: its disk has 7.0 MB free.*9.6 MB"):
            saved.need_room(tree, tree)
        saved.save_frozen(FROZEN, {})
        for step in (1, 2):
            saved.save(step, train_tree())
        saved.need_room(tree)  # one more, beside the two that are there


def test_saves_in_quick_succession_are_all_kept(tmp_path):
    """A save that comes while the one before is being written waits for it; it is not dropped."""
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints", keep=4)
    for step in (1, 2, 3):
        run.save(step, {"step": jnp.int32(step), "trainable": {"kernel": jnp.full((4096, 1024), step, float)}})
    run.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"1", "2", "3"}


@pytest.fixture
def two_steps(tmp_path):
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints", keep=3)
    run.save_frozen(FROZEN, {})
    for step in (3, 6):
        run.save(step, train_tree() | {"step": jnp.int32(step)})
    run.wait()
    return tmp_path


def damage(step):
    """Change one value that is stored, as a program would that knows nothing of digests."""
    for file in step.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)


def test_a_damaged_step_is_set_aside_and_the_one_before_taken(two_steps, capsys):
    damage(two_steps / "checkpoints" / "6" / "train")
    with pytest.raises(InputError, match=r"checkpoints/6.*this step is damaged: .*step 3, the one before"):
        stored.load_params(two_steps)
    run = run_steps.RunCheckpoints(two_steps / "checkpoints", keep=3)
    assert run.latest == 6
    assert int(run.restore(train_tree())["step"]) == 3 and run.latest == 3
    said = capsys.readouterr().err
    assert "checkpoints/6" in said and "set aside as 6.damaged" in said and "goes on from step 3" in said
    run.save(6, train_tree() | {"step": jnp.int32(6)})
    run.wait()
    assert {path.name for path in (two_steps / "checkpoints").iterdir()} >= {"3", "6", "6.damaged"}
    np.testing.assert_array_equal(stored.load_params(two_steps)["q"]["w"], TRAINABLE["q"]["w"])


def test_without_a_sound_step_nothing_is_moved_and_the_newest_is_named(two_steps):
    for step in ("3", "6"):
        damage(two_steps / "checkpoints" / step / "train")
    with pytest.raises(InputError, match="checkpoints/6"):
        run_steps.RunCheckpoints(two_steps / "checkpoints").restore(train_tree())
    assert {"3", "6"} <= {path.name for path in (two_steps / "checkpoints").iterdir()}


def test_a_step_under_the_name_of_another_is_not_taken_for_it(two_steps, capsys):
    (two_steps / "checkpoints" / "6").rename(two_steps / "checkpoints" / "9")
    assert int(run_steps.RunCheckpoints(two_steps / "checkpoints").restore(train_tree())["step"]) == 3
    assert "is step 6" in capsys.readouterr().err


def test_what_is_no_step_stops_no_run(two_steps, capsys):
    for name in ("9", "12", "lost+found", "6 (copy)", "tmp", "007"):
        (two_steps / "checkpoints" / name).mkdir()
    (two_steps / "checkpoints" / "12" / "notes.txt").write_text("mine")
    (two_steps / "checkpoints" / "15").write_text("a file")
    np.testing.assert_array_equal(stored.load_params(two_steps)["q"]["w"], TRAINABLE["q"]["w"])
    run = run_steps.RunCheckpoints(two_steps / "checkpoints", keep=9)
    assert int(run.restore(train_tree())["step"]) == 6
    assert "checkpoints/12 holds no step; it is set aside as 12.damaged" in capsys.readouterr().err
    assert (two_steps / "checkpoints" / "12.damaged" / "notes.txt").read_text() == "mine"
    for step in (9, 12, 15):
        run.save(step, train_tree() | {"step": jnp.int32(step)})
    run.wait()
    assert run_steps.RunCheckpoints(two_steps / "checkpoints").latest == 15


def test_a_run_without_digests_goes_on_and_says_that_it_is_not_verified(two_steps, capsys):
    for step in ("3", "6"):
        file = two_steps / "checkpoints" / step / run_steps.STEP_METADATA
        file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {}}))
    manifest = json.loads((two_steps / "checkpoints" / "manifest.json").read_text())
    del manifest["frozen"]
    (two_steps / "checkpoints" / "manifest.json").write_text(json.dumps(manifest))
    assert int(run_steps.RunCheckpoints(two_steps / "checkpoints").restore(train_tree())["step"]) == 6
    stored.load_params(two_steps)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("it is not verified" in line for line in said)


def test_values_that_are_not_finite_are_not_saved_and_the_step_before_is_restored(two_steps):
    run = run_steps.RunCheckpoints(two_steps / "checkpoints")
    ruined = train_tree() | {"trainable": {"q": {"w": TRAINABLE["q"]["w"].at[0, 0].set(jnp.inf)}}}
    with pytest.raises(InputError, match="checkpoints/9.*1 tensors are not finite: trainable/q/w.*step 6 before it"):
        run.save(9, ruined | {"step": jnp.int32(9)})
    assert int(run_steps.RunCheckpoints(two_steps / "checkpoints").restore(train_tree())["step"]) == 6


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.int8, bool])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 0)])
def test_what_lies_on_an_accelerator_has_the_same_digest(dtype, shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(dtype)
    assert int(digests._placed_checksum(jnp.asarray(leaf))) == digests._checksum(leaf)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.float64, np.int64])
def test_every_single_bit_changes_the_digest(dtype):
    leaf = np.zeros((2, 3), dtype)
    bits, seen = leaf.view(np.uint8), set()
    for place in np.ndindex(bits.shape):
        for bit in range(8):
            bits[place] ^= 1 << bit
            seen.add(digests.leaf_digests({"w": leaf})["w"])
            bits[place] ^= 1 << bit
    assert digests.leaf_digests({"w": leaf})["w"] not in seen


def test_a_packed_model_knows_its_values_its_config_and_its_tokenizer(tmp_path, golden):
    tokenizer = Tokenizer.load(golden / "weights/llama")
    models.save_packed(tmp_path, {"a": {"w": np.float32([0.5, 2])}}, {"alpha": 16}, tokenizer=tokenizer)
    stored.load_params(tmp_path)
    for name, change in (
        (models.PACKED, lambda c: c[:-1] + bytes([c[-1] ^ 1])),
        (models.PACKED, lambda c: c.replace(b"F32", b"I32")),
        ("config.json", lambda c: c.replace(b"16", b"17")),
        ("tokenizer.json", lambda c: c + b" "),
    ):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(change(before))
        with pytest.raises(InputError, match=f"{name}.*written"):
            stored.load_params(tmp_path)
        (tmp_path / name).write_bytes(before)
    stored.load_params(tmp_path)


def test_integers_of_the_width_of_the_floats_do_not_fit_a_model():
    (line,) = digests.describe_mismatch({"a": np.zeros(2, np.float32)}, {"a": np.zeros(2, np.int32)})
    assert line == "a: checkpoint int32, model float32"


def test_the_config_and_the_tokenizer_of_a_run_are_those_that_it_wrote(two_steps):
    for name in ("config.json", "tokenizer.json"):
        (two_steps / name).write_text('{"alpha": 16}')
    run = run_steps.RunCheckpoints(two_steps / "checkpoints")
    run.note_description()
    stored.load_params(two_steps)
    for name, content in (("config.json", '{"alpha": 17}'), ("tokenizer.json", None)):
        (two_steps / name).write_text(content) if content else (two_steps / name).unlink()
        with pytest.raises(InputError, match=f"{name}.*(not what was written|is missing)"):
            stored.load_params(two_steps)
        (two_steps / name).write_text('{"alpha": 16}')
    assert run.manifest["frozen_hash"]


def test_the_newest_two_steps_are_kept_by_default(tmp_path):
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        run.save(step, {"step": jnp.int32(step), "trainable": TRAINABLE})
    run.wait()
    assert run_steps.steps_of(run.folder) == {2, 3} and run.latest == 3


def test_what_stopped_the_saving_of_a_step_is_raised_once(tmp_path):
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    run.raise_failed()  # nothing was saved
    for error, raised, waits in (
        (TimeoutError(), False, True),
        (OSError("disk full"), True, True),
        (None, False, False),
    ):
        run._saving = mock.Mock()
        run._saving.result.side_effect = [error] if error else None
        if raised:
            with pytest.raises(OSError, match="disk full"):
                run.raise_failed()
        else:
            run.raise_failed()
        assert (run._saving is not None) == waits
    run.wait()


@pytest.mark.parametrize(("sound", "refused"), [([True, True], False), ([True, False], True)])
def test_a_step_that_another_process_cannot_read_is_not_taken(saved, monkeypatch, sound, refused):
    here = {name: getattr(jax, name) for name in ("tree", "ShapeDtypeStruct")}
    monkeypatch.setattr(run_steps, "jax", SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1, **here))
    monkeypatch.setattr(
        run_steps,
        "multihost_utils",
        mock.Mock(process_allgather=lambda own: np.array([sound[0] and bool(own), sound[1]])),
    )
    run = run_steps.RunCheckpoints(saved / "checkpoints")
    if refused:
        with pytest.raises(InputError, match="checkpoints/7.*cannot be read by another process"):
            run.restore(train_tree())
    else:
        assert int(run.restore(train_tree())["step"]) == 7
    assert not run_steps.multihost_utils.sync_global_devices.called


def test_names_for_what_is_set_aside_are_free_ones(tmp_path, monkeypatch):
    run = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    waited: list[str] = []
    for name in ("9.damaged", "9.damaged1", "9.damaged2", "9.damaged3"):
        if name == "9.damaged3":  # with several processes, the first one renames while the others wait
            monkeypatch.setattr(run_steps.jax, "process_count", lambda: 2)
            monkeypatch.setattr(run_steps.multihost_utils, "sync_global_devices", waited.append)
        (run.folder / "9").mkdir()
        assert run._set_aside("9") == name and (run.folder / name).is_dir() and not (run.folder / "9").exists()
        assert len(waited) == (2 if name == "9.damaged3" else 0)


def test_a_checkpoint_is_identified_by_what_it_holds_and_not_by_its_place(two_steps, tmp_path_factory):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (two_steps / name).write_text("{}")
    before = stored.identity(two_steps)

    def changed(change) -> bool:
        copy = tmp_path_factory.mktemp("copy") / "run"
        shutil.copytree(two_steps, copy)
        change(copy)
        return stored.identity(copy) != before

    steps = "checkpoints"
    assert not changed(lambda run: None)
    assert not changed(lambda run: damage(run / steps / "3" / "train"))  # the newest step counts
    assert not changed(lambda run: (run / "metrics.jsonl").write_text("{}"))
    assert changed(lambda run: damage(run / steps / "6" / "train"))
    assert changed(lambda run: damage(run / steps / "frozen"))
    assert changed(lambda run: (run / steps / "6").rename(run / steps / "9"))
    assert changed(lambda run: (run / steps / "manifest.json").write_text("{}"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert changed(lambda run, name=name: (run / name).write_text("[]"))


@pytest.mark.parametrize("place", [0, 1 / 16, 0.5, 15 / 16])
def test_the_identity_of_a_model_without_digests_has_samples_of_its_file(tmp_path, place):
    models.save_packed(tmp_path, {"w": np.zeros(2**16, np.float32)}, {})
    file = tmp_path / models.PACKED
    before, content = stored.identity(tmp_path), bytearray(file.read_bytes())
    content[int(len(content) * place) + 7] ^= 1
    file.write_bytes(content)
    assert stored.identity(tmp_path) != before
    (tmp_path / models.MANIFEST).unlink()
    assert stored.identity(tmp_path) != before


def test_what_orbax_says_is_kept_for_the_caller_and_not_printed():
    logger, shown = logging.getLogger("absl"), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    try:
        kept: list[str] = []
        with orbax.quiet(outer := []), orbax.quiet(kept):
            logger.warning("odd folder")
        with orbax.quiet():
            logger.warning("hidden")
        logger.warning("Removing existing directory since it is not finalized: x")
        logger.error("Error in background save thread")
        logger.warning("told")
    finally:
        logger.removeHandler(handler)
    assert (kept, outer, shown) == (["odd folder"], [], ["told"])
