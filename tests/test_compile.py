"""Ahead-of-time compilation for TPU slices: what fits, what moves, what is kept. Small widths, real compiler."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import finetune
from crab_jax import compile as verb
from crab_jax import defaults, losses, optim
from crab_jax.aot import cost, gpu, hlo
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.models.llama import Llama, LlamaConfig
from crab_jax.parallel import chips, sharding
from crab_jax.runs import run_mesh
from crab_jax.training import train_step
from crab_jax.training.step_programs import abstract_batch
from data_pipelines.batching import Bucket

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)
needs_cuda = pytest.mark.skipif(not gpu.installed(), reason=gpu.MISSING)
LAYERS = 3
BUCKET = Bucket(144, 2, 2, 98, 1)
WIDE = Bucket(1024, 10, 10, 198, 0)
OVERRIDES = {
    "model": "tiny",
    "data.batch_size": 16,
    "data.lengths": (144,),
    "mesh.fsdp": 4,
    "optim.accumulate": 1,
    "sizes.llama.layers": LAYERS,
    "sizes.llama.hidden": 512,
    "sizes.llama.mlp_dim": 1280,
    "sizes.llama.dtype": "bfloat16",
    "sizes.llama.remat": "full",
    "sizes.visual.out_dim": 512,
    "sizes.audio.out_dim": 512,
    "sizes.seg.llm_dim": 512,
    "sizes.clip.layers": 2,
    "sizes.beats.layers": 1,
    "sizes.visual.layers": 1,
    "sizes.audio.layers": 1,
    "sizes.clip.taps": (1, 2, 2),
}


def joint(values):
    """The joint stage's config with other values."""
    config = finetune.get_config()
    for path, value in values.items():
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return resolve(config)


def small(**changes):
    """The joint stage at small width, its language model in bfloat16 and split over four chips."""
    return joint(OVERRIDES | {name.replace("__", "."): value for name, value in changes.items()})


def wide(*trainable):
    """The language model at its real width but three layers deep, split over four chips; two rows on each."""
    groups = (
        *defaults.ENCODERS,
        *defaults.QFORMERS,
        *defaults.LORA,
        *defaults.LLAMA,
        *defaults.SEGMENTATION,
        *defaults.FOURIER,
    )
    return joint(
        {
            "data.batch_size": 8,
            "mesh.fsdp": 4,
            "optim.accumulate": 1,
            "sizes.llama.layers": LAYERS,
            "trainable": trainable,
            "frozen": tuple(group for group in groups if group not in trainable),
        }
    )


@pytest.fixture(scope="module")
def devices():
    return verb.topology_devices("v5e:2x2")


@pytest.fixture(scope="module")
def step(devices):
    """(config, report, compiled) of the joint stage's step."""
    config = small()
    return config, *verb.measure(config, "v5e:2x2", devices, BUCKET, "train")


@pytest.fixture(scope="module")
def lora(devices):
    """(config, report) of a step that trains LoRA alone."""
    config = wide(*defaults.LORA)
    return config, verb.measure(config, "v5e:2x2", devices, WIDE, "train")[0]


@needs_libtpu
@pytest.mark.exhaustive
def test_the_report_says_what_the_issue_asks_for(step):
    _, report, _ = step
    assert report["fits"] and report["topology"] == "v5e:2x2" and report["chips"] == 4
    assert report["hbm_bytes"] == int(15.75 * 2**30)
    assert 0 < report["argument_bytes"] < report["peak_bytes"] < report["hbm_bytes"] and report["temporary_bytes"] > 0
    assert report["compile_s"] > 0 and report["model_flops_per_chip"] > 0
    assert report["model_flops_per_chip"] < report["flops_per_chip"], "remat recomputes"
    assert {"count", "bytes"} == set(report["collectives"]["all-gather"])
    json.dumps(report)
    assert "headroom" in verb.text(report) and verb.table([report]).count("\n") == 2


@needs_libtpu
@pytest.mark.exhaustive
def test_a_thorough_report_says_what_the_time_is_spent_on():
    devices = verb.topology_devices("v5e:2x2", thorough=True)
    config = small(sizes__lora__dropout=0.05)
    report, _ = verb.measure(config, "v5e:2x2", devices, BUCKET, "llm", thorough=True)
    assert report["bucket"] | {"frames": 0, "windows": 0, "masks": 0} == report["bucket"]
    assert {"base", "lora", "dropout_bits", "attention", "softmax"} < set(report["estimate"]) <= set(cost.PARTS)
    assert sum(report["estimate"].values()) == pytest.approx(report["estimate_s"])
    assert sum(report["passes"].values()) == pytest.approx(report["estimate_s"]) and all(report["passes"].values())
    assert 0 < report["mfu_4n"] < 1 and report["compile_cpu_s"] > 0
    assert {"encoders", "qformers", "mask_decoder"}.isdisjoint(report["estimate"]), "text alone"


@needs_libtpu
@pytest.mark.exhaustive
def test_frozen_matrices_are_gathered_layer_by_layer_and_never_kept_in_float32(step):
    config, report, compiled = step
    assert report["findings"] == []
    gathers = [
        op
        for op in hlo.ops(compiled.as_text())
        if op.opcode.startswith("all-gather")
        and op.times >= LAYERS
        and op.source.startswith("frozen['llama']['layers']")
    ]
    assert gathers, "the frozen layers are split, so each must be gathered inside the loop over layers"


@needs_libtpu
def test_the_embedding_table_stays_where_it_is_on_a_mesh_of_all_three_axes():
    """Tokens and looked-up rows travel. Left to itself the compiler gathers the table over fsdp for every batch."""
    mesh = sharding.make_mesh(2, 2, 2, verb.topology_devices("v5e:2x4"))
    model = Llama(LlamaConfig(layers=1))
    where = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    table = jax.ShapeDtypeStruct((model.cfg.padded_vocab, model.cfg.hidden), jnp.bfloat16, sharding=where)
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def gathered(lookup) -> int:
        """Bytes of the largest all-gather."""

        def traced(table, tokens):
            with sharding.constrained(mesh):
                return nn.with_logical_constraint(lookup(table, tokens), ("batch", None, None))

        program = hlo.ops(jax.jit(traced).lower(table, tokens).compile().as_text())
        return max(op.results[-1].bytes for op in program if op.opcode.startswith("all-gather"))

    def ours(table, tokens):
        return model.apply({"params": {"embed_tokens": {"embedding": table}}}, tokens, method="embed")

    assert gathered(ours) <= tokens.size * 4
    assert gathered(lambda table, tokens: jnp.take(table, tokens, axis=0)) > table.size // 2


def test_findings_name_what_is_gathered_and_widened():
    config = small()
    mesh = sharding.make_mesh(1, 1, 1)
    gate = "frozen['llama']['layers']['mlp']['gate_proj']['kernel']"
    program = [
        hlo.Op("a", "all-gather", (hlo.Array("bf16", (LAYERS, 512, 1280)),), 1, True, gate),
        hlo.Op("b", "all-gather-start", (hlo.Array("f32", (4, 144, 768)),), 1, False),
        hlo.Op("c", "fusion", (hlo.Array("f32", (1, 1280, 512)),), LAYERS, False, gate),
        hlo.Op("fused", "convert", (hlo.Array("f32", (1280, 512)),), LAYERS, True, gate),
        hlo.Op("one layer", "all-gather", (hlo.Array("bf16", (512, 1280)),), LAYERS, False, gate),
        hlo.Op("a gradient of that size", "fusion", (hlo.Array("f32", (512, 1280)),), LAYERS, False),
    ]
    found = verb.findings(config, mesh, program)
    assert len(found) == 3
    for wanted in (
        f"gathers all layers of {gate}",
        "gathers logits (4, 144, 768)",
        f"{gate} (1, 1280, 512) in float32",
    ):
        assert any(wanted in line for line in found), found


@needs_libtpu
@pytest.mark.exhaustive
def test_moments_and_gradients_exist_for_trainables_only(lora, devices):
    """Training the language model as well adds, for each of its weights, what LoRA alone does not hold: two moments and
    a value in float32 in place of bfloat16, a gradient in float32, and a copy in bfloat16 to compute with."""
    config, report = lora
    whole, _ = verb.measure(wide(*defaults.LORA, *defaults.LLAMA), "v5e:2x2", devices, WIDE, "train")
    cfg = config.model.llama
    weights = (LAYERS * (4 * cfg.hidden**2 + 3 * cfg.hidden * cfg.mlp_dim) + 2 * cfg.padded_vocab * cfg.hidden) / 4
    more = {name: (whole[name] - report[name]) / weights for name in ("argument_bytes", "temporary_bytes")}
    print("bytes per weight and chip:", more)
    assert more["argument_bytes"] == pytest.approx(4 + 4 + 4 - 2, rel=0.02)
    assert 4 < more["temporary_bytes"] < 8


@needs_libtpu
@pytest.mark.exhaustive
def test_training_lora_takes_less_than_half_as_much_again_as_a_forward_pass(lora, devices):
    config, report = lora
    mesh, model = run_mesh.mesh_of(config, devices), config.model.build()
    state, frozen = verb.abstract_state(config, mesh)
    batch = abstract_batch(WIDE, config.mixture.batch_size, config.data.image_size, sharding.batch_sharding(mesh))

    def forward(trainable, frozen, batch):
        with sharding.constrained(mesh):
            out = model.apply(
                {"params": optim.merge(trainable, frozen)},
                batch,
                jnp.arange(len(batch.index)),
                rngs={"dropout": jax.random.key(0)},
            )
            rows = train_step.loss_rows(out, batch)
            return losses.total({name: losses.pool(term) for name, term in rows.items()}, config.loss)

    memory = jax.jit(forward).lower(state.trainable, frozen, batch).compile().memory_analysis()
    # What was allocated, and what of it was in use at the fullest moment.
    ratios = (
        report["temporary_bytes"] / memory.temp_size_in_bytes,
        (report["xla_peak_bytes"] - report["argument_bytes"])
        / (memory.peak_memory_in_bytes - memory.argument_size_in_bytes),
    )
    print("step over forward pass:", report["temporary_bytes"], memory.temp_size_in_bytes, ratios)
    assert max(ratios) < 1.5


@needs_libtpu
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_what_generates_has_the_layout_and_the_mesh_of_evaluate(weights):
    """A copy on each chip of the first host, of four chips; int8 matrices are int8."""
    config, devices = small(), verb.topology_devices("v5e:4x4")
    serving = verb.Serving(weights, 16)
    mesh = verb.mesh_for(config, devices, "decode", serving)
    assert mesh.shape["tensor"] == 1 and mesh.shape["data"] == len(mesh.devices.flat) <= 8
    params, state, _ = verb.program_of(config, mesh, BUCKET, "decode", serving).args
    kernel = params["llama"]["layers_0"]["qkv"]["kernel"]
    assert kernel.dtype == {"float": "bfloat16", "int8": "int8"}[weights] and kernel.sharding.is_fully_replicated
    assert state.cache.k[0].shape == (16, 4, 128, BUCKET.length + verb.NEW_TOKENS)
    assert state.cache.k[0].sharding.spec == PartitionSpec(("data", "fsdp"))


@needs_libtpu
@pytest.mark.exhaustive
@pytest.mark.parametrize("tensor", [1, 4])
def test_a_decode_step_has_the_cache_in_place_and_the_time_of_one_token(tensor):
    devices, config = verb.topology_devices("v5e:2x2", thorough=True), small(mesh__fsdp=1, mesh__tensor=tensor)
    report, compiled = verb.measure(config, "v5e:2x2", devices, BUCKET, "decode", True, verb.Serving("float", 16))
    cache = 2 * LAYERS * report["rows"] * (BUCKET.length + verb.NEW_TOKENS) * 512 * 2 / 4
    assert report["fits"] and report["alias_bytes"] >= cache, "the cache is updated in place"
    whole = sum(each.seconds for each in cost.spent(hlo.ops(compiled.as_text()), chips.chip_of(devices[0])))
    assert 0 < report["estimate_s"] < whole, "what comes before and after the loop is no part of a token"


@needs_libtpu
def test_what_does_not_fit_is_reported_with_its_size(devices):
    config = small(data__batch_size=4096 * 16)
    report, compiled = verb.measure(config, "v5e:2x2", devices, BUCKET, "train")
    assert compiled is None and not report["fits"]
    assert report["peak_bytes"] > report["hbm_bytes"] and report["headroom"] < 0
    assert "does not fit" in verb.text(report)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v4:2x2x2", 8, "TPU v4"),
        ("v5p:2x2x4", 16, "TPU v5"),
        ("v6e:4x4", 16, "TPU v6 lite"),
        ("v5e:1x1", 1, "TPU v5 lite"),
    ],
)
def test_topologies_have_one_device_per_chip(name, count, kind):
    found = verb.topology_devices(name)
    assert len(found) == count and found[0].device_kind == kind


@needs_libtpu
def test_chips_of_several_slices_name_their_slice():
    mesh = sharding.make_mesh(0, 2, 1, verb.topology_devices("v5e:2x2", slices=2))
    assert dict(mesh.shape) == {"slices": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


@needs_libtpu
@pytest.mark.exhaustive
def test_each_chip_sends_its_part_of_the_gradient_between_slices_and_nothing_else(tmp_path):
    """With two micro-batches, in the program of the TPU compiler, which pads arrays to its tiles."""
    devices, config = verb.topology_devices("v5e:2x2", slices=2), small(mesh__fsdp=2, optim__accumulate=2)
    report, _ = verb.measure(config, "v5e:2x2", devices, BUCKET, "train")
    trainable, _ = verb.abstract_params(config, run_mesh.mesh_of(config, devices))
    part = sum(leaf.size * 4 for leaf in jax.tree.leaves(trainable)) / 4
    between = report["networks"]["dcn"]
    assert set(between) == {"all-reduce"} and part <= between["all-reduce"]["bytes"] < 1.25 * part
    assert report["slices"] == 2 and report["chips"] == 8 and report["findings"] == []
    assert report["networks"]["ici"]["all-gather"]["bytes"] > 0 and report["roofline_s"]["dcn"] > 0
    assert "2 slices of v5e:2x2" in verb.text(report) and "dcn all-reduce" in verb.text(report)


@needs_cuda
@pytest.mark.parametrize(
    "name",
    ["h200", pytest.param("h100", marks=pytest.mark.exhaustive), pytest.param("b200", marks=pytest.mark.exhaustive)],
)
def test_a_program_of_gpus_is_compiled_where_there_are_none(name):
    """In a process of its own, because JAX loads every plug-in that it finds and prints about drivers."""
    flags = [f"--config.{path}={value}" for path, value in (OVERRIDES | {"sizes.llama.layers": 2}).items()]
    command = [sys.executable, "-m", "crab_jax.compile", "--config=configs/finetune.py", f"--topology={name}:4"]
    done = subprocess.run([*command, "--stage=llm", "--bucket=144,2,2,98,1", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{name}:4: 4 chips, llm, mesh data 1 x fsdp 4" in done.stdout and "of memory traffic" in done.stdout
    assert "all-gather" in done.stdout


def test_gpus_come_in_nodes_of_eight_and_no_slices():
    assert chips.chips_of("h200:16") == ("h200", 16) and chips.chips_of("b200:4") == ("b200", 4)
    with pytest.raises(InputError, match="'h200:12' is no number of nodes"):
        chips.chips_of("h200:12")
    with pytest.raises(InputError, match="'h200:2x4' is unknown"):
        chips.chips_of("h200:2x4")
    with pytest.raises(InputError, match="--slices.*is for TPUs.*h200:16"):
        verb.topology_devices("h200:8", slices=2)


def test_the_description_of_a_gpu_names_it_as_cuda_does():
    for chip in chips.GPUS:
        described = gpu.target_config(chip)
        assert f'device_description_str: "{chip.kind}"' in described
        assert f"memory_bandwidth: {int(chip.hbm_bandwidth)}" in described
        assert chips.chip_of(SimpleNamespace(device_kind=f"{chip.kind} 80GB HBM3")) is chip
    assert chips.chip_of(SimpleNamespace(device_kind="NVIDIA H2000")) is None


def test_the_memory_of_an_abstract_gpu_is_not_asked():
    class CompileOnlyPyClient:
        pass

    def asked():
        raise AssertionError

    abstract = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H200", client=CompileOnlyPyClient(), memory_stats=asked
    )
    assert chips.memory_of(abstract) == 139 * 2**30


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:axb", "v5e:0x2", "h200:x", "h200"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(InputError, match="--topology.*v5e:16x16"):
        verb.topology_devices(name)


@needs_libtpu
@pytest.mark.exhaustive
def test_the_budget_decides_the_exit_code_and_the_last_line(tmp_path):
    flags = [f"--config.{path}={value}" for path, value in OVERRIDES.items()]
    command = [
        sys.executable,
        "-m",
        "crab_jax.compile",
        "--config=configs/finetune.py",
        "--topology=v5e:2x2",
        "--bucket=144,2,2,98,1",
        "--budget",
        *flags,
    ]
    large = subprocess.run(
        [*command, "--config.data.batch_size=65536", f"--json={tmp_path / 'out.json'}"], capture_output=True, text=True
    )
    assert large.returncode == 3, large.stderr[-2000:]
    assert large.stdout.splitlines()[-1].startswith("v5e: need ") and "have 15.75 GiB" in large.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert tuple(written) == verb.REPORT_KEYS and not written["fits"]


def test_a_wrong_flag_exits_with_2_and_one_line():
    command = [sys.executable, "-m", "crab_jax.compile", "--config=configs/finetune.py"]
    done = subprocess.run([*command, "--topology=v9:2x2"], capture_output=True, text=True)
    assert done.returncode == 2 and "v9:2x2" in done.stderr and len(done.stderr.splitlines()) == 1


@needs_libtpu
def test_the_sweep_compiles_only_what_could_be_the_best(devices, monkeypatch, capsys):
    """Once a step fits that takes no longer than the arithmetic of the rest, it ends."""
    tried = []

    def measured(config, topology, devices, bucket, stage):
        tried.append((config.mesh.fsdp, config.model.llama.remat, config.optim.accumulate))
        fits = config.mesh.fsdp == 4 and config.optim.accumulate == 2
        return {"fits": fits, "headroom": 0.5, "roofline_s": {"step": 2.0}, "accumulate": config.optim.accumulate}, None

    found = [(1.0, 1, 1, 1, "dots"), (1.0, 2, 1, 4, "dots"), (1.5, 4, 1, 4, "dots"), (2.0, 1, 1, 1, "full")]
    monkeypatch.setattr(verb, "trials", lambda *args: [verb.Trial(*trial) for trial in found])
    monkeypatch.setattr(verb, "measure", measured)
    reports = verb.sweep(small(data__batch_size=8), "v5e:2x2", devices, BUCKET)
    assert tried == [(1, "dots", 1), (4, "dots", 2)] and len(reports) == 1, "4 micro-batches gather more often than 2"
    assert "1 of 4 are not compiled: they take 2.000 s" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.exhaustive
def test_the_sweep_tries_first_what_recomputes_and_gathers_the_least(devices):
    found = verb.trials(small(), devices, BUCKET)
    assert {trial.remat for trial in found} == {"none", "dots", "full"} and {trial.tensor for trial in found} == {
        1,
        2,
        4,
    }
    assert {trial.accumulate for trial in found if trial.tensor == 1} == {1, 2, 4}, "a chip has 4 rows"
    assert found == sorted(found)
    of = {trial[1:]: trial.seconds for trial in found}
    assert of[1, 1, 4, "none"] <= of[1, 1, 4, "dots"] < of[1, 1, 4, "full"]
    assert of[4, 1, 4, "full"] >= of[1, 1, 4, "full"]
    joint_stage = resolve(finetune.get_config())
    assert verb._kept(joint_stage.model.llama, "none", 1024) * 2 > 4 * 2**30


def test_buckets_have_the_frames_of_every_prepared_root(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(verb.run_data, "own_frames", lambda root: {"a": 8, "b": 0}[Path(root).name])
    config = joint({"data.roots": f"{tmp_path}/a,{tmp_path}/b,{tmp_path}/elsewhere"})
    assert verb.frame_counts(config) == [8, 10] and verb.largest_bucket(config).frames == 10
    assert {bucket.frames for bucket in verb.bucket_mix(config)} == {1, 8, 10}
    assert verb.frame_counts(joint({"data.roots": f"{tmp_path}/elsewhere"})) == [10]


def test_the_mix_holds_every_bucket_once_and_the_largest_covers_it():
    config = resolve(finetune.get_config())
    mix, largest = verb.bucket_mix(config), verb.largest_bucket(config)
    assert len(set(mix)) == len(mix) == 5
    assert all(size <= limit for bucket in mix for size, limit in zip(bucket, largest, strict=True))
    assert jnp.dtype(config.frozen_dtype) == jnp.bfloat16
