"""Where parameters lie: the golden of crab_7b, inferred meshes, refusals with numbers, and that no mesh changes a step.

python -m tests.test_sharding      rewrites tests/crab_7b_shardings.json
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from configs import finetune
from crab_jax import optim
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.models.presets import crab_7b
from crab_jax.parallel import chips, distributed, sharding
from crab_jax.runs import run_mesh, run_params
from tests.programs import same_step

GOLDEN = Path(__file__).parent / "crab_7b_shardings.json"
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    platform: str = "cpu"


def specs() -> dict[str, list]:
    """{parameter: mesh axis of each of its axes} of crab_7b, without trailing axes that are not split."""
    boxed = run_params.abstract_params(crab_7b().build())
    flat = traverse_util.flatten_dict(sharding.param_shardings(boxed, sharding.make_mesh(1, 1, 1)), sep="/")
    return {path: list(flat[path].spec) for path in sorted(flat)}


def test_every_parameter_of_crab_7b_lies_as_committed():
    assert specs() == json.loads(GOLDEN.read_text()), "changed on purpose? python -m tests.test_sharding"


def test_every_matrix_of_the_language_model_is_split_over_both_axes():
    committed = json.loads(GOLDEN.read_text())
    matrices = {
        path: spec
        for path, spec in committed.items()
        if path.startswith("llama/") and path.endswith(("kernel", "embedding"))
    }
    assert len(matrices) == 9
    assert all({"fsdp", "tensor"} <= set(spec) for spec in matrices.values()), matrices


@pytest.mark.parametrize(
    ("devices", "state", "memory", "expected"),
    [
        (256, 17 * 2**30, int(15.75 * 2**30), 8),
        (16, 17 * 2**30, int(31.25 * 2**30), 4),
        (16, 17 * 2**30, int(95.74 * 2**30), 1),
        (12, 17 * 2**30, int(15.75 * 2**30), 6),
        (2, 10**15, 2**30, 2),
        (8, 10**15, None, 1),
    ],
)
def test_fsdp_is_the_fewest_devices_that_leave_room(devices, state, memory, expected):
    assert sharding.infer_split(devices, state, memory) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (0, 3, 1), (2, 2, 3)])
def test_a_mesh_that_is_not_the_devices_is_refused_with_its_numbers(sizes):
    devices = [SimpleNamespace(platform="cpu", device_kind="cpu")] * 8
    with pytest.raises(InputError, match="8 devices"):
        sharding.make_mesh(*sizes, devices=devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU chip."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_chips_are_grouped_by_the_slice_that_they_name():
    chips_ = [Chip(number, slice_index=number % 2) for number in range(8)]
    groups = sharding.slices_of(chips_)
    assert [[chip.slice_index for chip in group] for group in groups] == [[0] * 4, [1] * 4]
    assert groups == sharding.slices_of(chips_, 1) == sharding.slices_of(chips_, 2)
    with pytest.raises(InputError, match="mesh.slices.*is 4, with 2 slices of 4 and 4 devices"):
        sharding.slices_of(chips_, 4)
    with pytest.raises(InputError, match="mesh.slices.*2 slices of 4 and 3 devices"):
        sharding.slices_of(chips_[:-1])


def test_the_first_axis_of_a_mesh_over_slices_crosses_them_and_no_other():
    devices = [Device(number) for number in range(8)]
    mesh = sharding.make_mesh(0, 2, 1, devices, slices=2)
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [device.id for device in mesh.devices[0].flat] == [0, 1, 2, 3]
    assert sharding.row_groups(mesh) == 8
    assert dict(sharding.make_mesh(0, 2, 1, devices, slices=1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (0, 8, 1), (1, 4, 2), (1, 0, 1)])
def test_a_mesh_whose_parameters_would_cross_slices_is_refused(sizes):
    with pytest.raises(InputError, match=r"1 x \d x \d does not divide over 2 slices of 4.*only mesh.data may cross"):
        sharding.make_mesh(*sizes, devices=[Device(number) for number in range(8)], slices=2)


def test_slices_that_the_devices_cannot_make_are_refused():
    with pytest.raises(InputError, match="mesh.slices.*is 3, with 1 slices of 8 devices"):
        sharding.make_mesh(devices=[Device(number) for number in range(8)], slices=3)


def test_an_inferred_split_of_the_parameters_stays_within_a_slice():
    chips_ = [Chip(number, number // 4) for number in range(16)]
    mesh = sharding.make_mesh(0, 0, 1, [dataclasses.replace(chip, platform="gpu") for chip in chips_], 2**60, 4)
    assert mesh.shape["fsdp"] == 4 and mesh.shape["slices"] == 4


def fake_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def test_a_batch_that_does_not_divide_is_refused_with_its_numbers():
    sharding.check_batch(512, fake_mesh(32, 8, 1), 2)
    with pytest.raises(InputError, match="512 rows do not divide over 256 devices in 3 micro-batches.*768"):
        sharding.check_batch(512, fake_mesh(32, 8, 1), 3)
    with pytest.raises(InputError, match="100 rows do not divide over 8 devices"):
        sharding.check_batch(100, fake_mesh(8, 1, 2))


def test_a_batch_is_divided_over_all_slices():
    mesh = AbstractMesh((2, 16, 8, 1), (sharding.SLICES, *sharding.AXES))
    sharding.check_batch(512, mesh, 2)
    assert sharding.batch_sharding(mesh).spec == PartitionSpec(("slices", "data", "fsdp"))
    with pytest.raises(InputError, match="384 rows do not divide over 256 devices"):
        sharding.check_batch(384, mesh)


def test_a_parameter_that_does_not_divide_is_refused_with_its_numbers():
    mesh = fake_mesh(1, 1, 3)
    leaf = jax.ShapeDtypeStruct((32128, 4096), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    with pytest.raises(InputError, match=r"mesh.tensor.*3 does not divide 32128 of llama/embed \(32128, 4096\)"):
        sharding.check_params({"llama": {"embed": leaf}}, mesh)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("v5e", (64, 4, 1), (1, "projections")),
        ("v5e", (4, 4, 1), (16, "projections")),
        ("v5e", (1, 4, 1), (64, "projections")),
        ("v6e", (8, 2, 1), (8, "projections")),
        ("v4", (16, 4, 1), (2, "projections")),
        ("v5p", (16, 1, 1), (2, "projections")),
        ("v5e", (64, 2, 2), (1, "projections")),
        ("v5e", (128, 2, 1), (1, "attention")),  # twice the matrices: what projections need of two rows is not free
    ],
)
def test_recomputation_and_micro_batches_of_the_joint_stage_follow_the_memory(monkeypatch, name, shape, expected):
    chip = next(chip for chip in chips.CHIPS if chip.name == name)
    device = jax.sharding.AbstractDevice(device_kind=chip.kind, num_cores=None, platform="tpu")
    abstract = AbstractMesh(shape, sharding.AXES, (AxisType.Auto,) * 3, abstract_device=device)
    monkeypatch.setattr(chips, "memory_of", lambda device: chip.hbm_bytes)
    wanted = run_params.wanted_params
    monkeypatch.setattr(run_params, "wanted_params", lambda config, model, mesh: wanted(config, model, abstract))
    mesh = SimpleNamespace(shape=abstract.shape, abstract_mesh=abstract, devices=np.array([None]))
    config = finetune.get_config()
    sizes, micro_batches = run_mesh.fitted(resolve(config), mesh)
    assert (micro_batches, sizes.llama.remat) == expected
    config.optim.accumulate, config.sizes.llama.remat = 1, "dots"
    given = resolve(config)
    assert run_mesh.fitted(given, mesh) == (given.model, 1), "what is given is not changed"


def test_without_a_known_memory_layers_are_computed_again_and_the_batch_is_whole():
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    sizes, micro_batches = run_mesh.fitted(resolve(finetune.get_config()), mesh)
    assert (micro_batches, sizes.llama.remat) == (1, "full")


@pytest.mark.parametrize(
    ("name", "count", "weights", "batch", "expected"),
    [
        ("v5e", 8, "float", 16, (4, 1, 2)),
        ("v5e", 8, "int8", 16, (8, 1, 1)),
        ("v6e", 4, "float", 6, (2, 1, 1)),
        ("v5e", 1, "float", 16, (1, 1, 1)),
        (None, 8, "float", 1, (1, 1, 1)),
    ],
)
def test_a_model_that_answers_is_split_no_more_than_it_must(monkeypatch, name, count, weights, batch, expected):
    memory = {chip.name: chip.hbm_bytes for chip in chips.CHIPS}.get(name)
    monkeypatch.setattr(chips, "memory_of", lambda device: memory)
    devices = [Device(number) for number in range(count)]
    mesh = run_mesh.serving_mesh(resolve(finetune.get_config()), weights, batch, devices=devices)
    assert tuple(mesh.shape.values()) == expected


@pytest.mark.parametrize(
    ("name", "count", "weights", "expected"),
    [
        ("v5e", 1, "int8", 4),
        ("v5e", 8, "float", 32),
        ("v6e", 4, "float", 32),
        ("v5p", 4, "float", 128),
        (None, 8, "float", 16),
    ],
)
def test_a_batch_of_answers_has_the_rows_that_memory_has_room_for(monkeypatch, name, count, weights, expected):
    """Their number is divided by the copies of the model, and longer answers leave room for fewer."""
    memory = {chip.name: chip.hbm_bytes for chip in chips.CHIPS}.get(name)
    monkeypatch.setattr(chips, "memory_of", lambda device: memory)
    config, devices = resolve(finetune.get_config()), [Device(number) for number in range(count)]
    rows = run_mesh.answered_rows(config, weights, 256, devices=devices)
    assert rows == expected
    assert run_mesh.answered_rows(config, weights, 8192, devices=devices) < rows or name is None
    assert rows % run_mesh.serving_mesh(config, weights, rows, devices=devices).shape["data"] == 0


def test_a_model_that_answers_is_not_split_by_a_number_that_does_not_divide():
    devices = [Device(number) for number in range(8)]
    with pytest.raises(InputError, match="3 does not divide the 8 devices"):
        run_mesh.serving_mesh(resolve(finetune.get_config()), "float", 16, 3, devices)
    with pytest.raises(InputError, match="int4 matrices are not split"):
        run_mesh.serving_mesh(resolve(finetune.get_config()), "int4", 16, 2, devices)


def test_moments_of_whole_parameters_are_spread_and_parameters_stay_whole():
    mesh = fake_mesh(4, 2, 1)

    def leaf(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    trainable = {
        "whole": leaf((768, 4096)),
        "small": leaf((8, 8)),
        "split": leaf((4096, 8), "fsdp"),
        "odd": leaf((771, 1001)),
    }
    from crab_jax.training.train_step import TrainState

    state = TrainState(jnp.int32(0), trainable, {"mu": trainable})
    out = sharding.state_shardings(state, trainable, mesh)
    assert out.trainable == {name: x.sharding for name, x in trainable.items()}
    moments = {name: s.spec for name, s in out.opt["mu"].items()}
    assert moments["whole"] == PartitionSpec(None, ("data", "fsdp"))
    assert moments["split"] == PartitionSpec("fsdp")
    assert moments["small"] == moments["odd"] == PartitionSpec()
    assert out.step.spec == PartitionSpec()


def test_every_slice_has_all_moments_so_that_no_updated_parameter_crosses_slices():
    mesh = AbstractMesh((2, 4, 2, 1), (sharding.SLICES, *sharding.AXES))
    whole = jax.ShapeDtypeStruct((768, 4096), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    assert sharding.moment_sharding(whole).spec == PartitionSpec(None, ("data", "fsdp"))


def test_each_device_of_a_slice_sends_its_part_of_the_gradient_of_crab_7b():
    """Within a thousandth: of 256 devices each has a 256th, whatever else the leaves are split by."""
    config = resolve(finetune.get_config())
    mesh = AbstractMesh((2, 64, 4, 1), (sharding.SLICES, *sharding.AXES))
    boxed = run_params.abstract_params(config.model.build())
    leaves = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    trainable = jax.tree.leaves(optim.split(leaves, config.trainable, config.frozen)[0])
    parts = [NamedSharding(mesh, sharding._in_parts(x, mesh)).shard_shape(x.shape) for x in trainable]
    assert sum(map(np.prod, parts)) == pytest.approx(sum(x.size for x in trainable) / 256, rel=2e-3)


def differences(*words: str, processes: int = 1) -> dict[str, dict[str, float]]:
    """What `python -m tests.programs.same_step WORDS` prints, with eight virtual devices over `processes` processes."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={8 // processes}"
    command, environ = [sys.executable, "-m", "tests.programs.same_step", *words], {**os.environ, "XLA_FLAGS": flags}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = []
    for index in range(processes):
        told = zip(distributed.EXPLICIT, (address, str(processes), str(index)), strict=True) if processes > 1 else ()
        started.append(
            subprocess.Popen(
                command,
                env={**environ, **dict(told)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=HERE.parent,
            )
        )
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def check_the_same(found: dict[str, dict[str, float]]) -> None:
    """Everything agrees to 1e-5, except where the batch is not the same."""
    for name, worst in found.items():
        compared = {key: value for key, value in worst.items() if key != "moved"}
        assert worst["moved"] > 1e-5, "the step must move every parameter of LoRA for this to test anything"
        if name == same_step.WRONG:
            assert all(value > 1e-4 for value in compared.values()), compared
        else:
            assert all(value < 1e-5 for value in compared.values()), (name, compared)


def test_the_mask_decoder_of_a_device_sees_its_own_rows_only():
    """Both kinds of masks of 7 rows are 14; a batch that is gathered would be 28, of both kinds 56."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.mask_rows"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = set(json.loads(done.stdout.splitlines()[-1]))
    assert {7, 14} <= sizes and not sizes & {28, 56}


@pytest.mark.slow
def test_no_mesh_no_micro_batches_and_no_remat_change_a_step():
    """One device against eight virtual ones, split in every way at once, in one slice and in two: loss, gradients and
    updated parameters."""
    check_the_same(differences("mixed, 2 micro-batches, remat", "2 slices, 2 micro-batches, remat"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", [(), ("masks", "mixed, 2 micro-batches, remat")], ids=["all", "masks"])
def test_no_way_to_split_a_step_changes_it(words):
    """Every mesh alone, with and without micro-batches and remat; and that one target less is seen."""
    found = differences(*words)
    assert words or (set(found) == set(same_step.CASES))
    check_the_same(found)


@pytest.mark.exhaustive
def test_two_processes_take_the_step_of_one_device():
    check_the_same(differences("mixed, 2 micro-batches, remat", "data", processes=2))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(specs(), indent=0) + "\n")
    print(f"wrote {GOLDEN}: {len(specs())} parameters; heads {resolve(finetune.get_config()).model.lora.heads}")
