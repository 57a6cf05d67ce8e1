"""Whole models of each weight state, imported from the golden directory as a user would, and its arrays."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file, torch_writer
from crab_jax.convert.importing import Files, import_weights
from crab_jax.convert.llama import PEFT
from crab_jax.convert.released import Choices
from crab_jax.models.clip import MEAN, STD, normalize
from crab_jax.models.mask_decoder import SegModule
from crab_jax.models.quirks import PRESETS
from crab_jax.runs import run_params
from crab_jax.tasks import TASKS
from data_pipelines import fbank
from data_pipelines.batching import Batch
from data_pipelines.tokens import Tokenizer

BINARY_TASKS, SEMANTIC_TASKS = ("s4", "ms3", "ref-avs"), ("avss",)


def pytest_generate_tests(metafunc):
    """One test per case that the golden directory lists: `text_case` is a text generated for one sample, `batch_case`
    for several, `mask_case` one with a mask; `step_case` a mixed training batch; `qformer_case` a shape of input."""
    folder = Path(os.environ.get("CRAB_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
    generated, steps = (json.loads((folder / name).read_text()) for name in ("generate.json", "train_step.json"))
    arrays = json.loads((folder / "manifest.json").read_text())["arrays"]
    cases = {
        "text_case": [name for name, case in generated.items() if len(case.get("samples", ())) == 1],
        "batch_case": [name for name, case in generated.items() if len(case.get("samples", ())) > 1],
        "mask_case": [name for name, case in generated.items() if "sample" in case],
        "step_case": [name for name, case in steps.items() if "is_avs_task" in case],
        "qformer_case": sorted({name.split(".")[0] for name in arrays["qformer.npz"]}),
    }
    for name in set(cases) & set(metafunc.fixturenames):
        metafunc.parametrize(name, cases[name])


@dataclasses.dataclass
class Golden:
    """A golden directory: arrays, records, sizes and the reference's own float32 errors."""

    folder: Path

    def __post_init__(self):
        self.manifest = self.json("manifest.json")
        listing = self.folder / "omitted.json"
        self.omitted = json.loads(listing.read_text()) if listing.exists() else {"files": [], "arrays": {}}

    def json(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def task(self, sample: str) -> str:
        """The task of one of samples.json."""
        return self.json("samples.json")[sample]["task_name"]

    def has_mask(self, sample: str) -> bool:
        """Whether a sample is about a mask."""
        return self.task(sample) in BINARY_TASKS + SEMANTIC_TASKS

    def file(self, name: str) -> Path:
        """Path of a file; skips the test when the directory lists it as left out, fails when it is just missing."""
        path = self.folder / name
        if not path.exists():
            if name in self.omitted["files"]:
                pytest.skip(f"{name} is left out of {self.folder.name}: set CRAB_GOLDEN_DIR to a whole directory")
            pytest.fail(f"{path} is missing")
        return path

    def arrays(self, file: str, prefix: str = "") -> dict[str, np.ndarray]:
        """Arrays of a file whose names start with `prefix`, which is cut off; skips or fails like `file`."""
        with np.load(self.file(file)) as z:
            found = {name.removeprefix(prefix): z[name] for name in z if name.startswith(prefix)}
        if not found:
            if any(name.startswith(prefix) for name in self.omitted["arrays"].get(file, ())):
                pytest.skip(f"{prefix}* of {file} is left out: set CRAB_GOLDEN_DIR to a whole directory")
            pytest.fail(f"{file} has no array {prefix}*")
        return found

    def tolerance(self, expected: np.ndarray, name: str) -> float:
        """Ten times the reference's float32 error, relative to the largest magnitude, floor 1e-6: the error recorded
        under `name`, else the largest under the nearest name above it ("clip" for "clip.hidden_states")."""
        recorded = self.manifest["fp32_noise"]
        while not (found := [entry for key, entry in recorded.items() if f"{key}.".startswith(f"{name}.")]):
            name, dot, _ = name.rpartition(".")
            assert dot, name
        relative = max(entry["max_abs_err_fp32_vs_fp64"] / entry["max_abs"] for entry in found)
        return max(10 * relative, 1e-6) * float(np.abs(expected).max())

    def close(self, actual, expected, name: str) -> None:
        """The two agree to the `tolerance` of the array of that name."""
        np.testing.assert_allclose(actual, expected, rtol=0, atol=self.tolerance(np.asarray(expected), name))

    def close_fbank(self, actual, expected, window: str) -> None:
        """Normalised filter banks agree as the log energies that they were: of those the error is recorded."""
        actual, expected = (np.float64(x) * (2 * fbank.STD) + fbank.MEAN for x in (actual, expected))
        self.close(actual, expected, f"fbank.{window}.raw")


@pytest.fixture(scope="session")
def data(golden) -> Golden:
    return Golden(golden)


def mask_branch_alone(file: Path, out: Path) -> Path:
    """A file in the form of segmentation_pretrain.bin with the mask branch of a fine-tuning file."""
    tensors = {key.removeprefix(PEFT): value for key, value in torch_file.read(file).items() if "seg_module" in key}
    torch_writer.save(
        out,
        {
            key: torch_writer.Tensor(value.shape, value.dtype, lambda value=value: value)
            for key, value in tensors.items()
        },
    )
    return out


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    """state -> folder of the imported checkpoint of 'ntp', 'avs' or 'avss'."""
    made = {}
    config = data.manifest["config"]
    weights = data.folder / "weights"
    unsaved = weights / "crab/unsaved_state.npz"

    def make(state: str) -> Path:
        if state not in made:
            out = tmp_path_factory.mktemp(state)
            masks = data.file(f"weights/crab/{'avs' if state == 'ntp' else state}_finetune_weights.bin")
            if state == "ntp":  # nothing of this state is about masks, but the module must be there
                masks = mask_branch_alone(masks, out / "segmentation.bin")
            files = Files(
                weights / "clip",
                weights / "llama",
                next((weights / "beats").glob("*.pt")),
                (weights / "crab/finetune_weights.bin", masks),
                token_rows=unsaved,
                position_buffers=unsaved,
                state="avs." if state == "ntp" else f"{state}.",
            )
            import_weights(
                files,
                out,
                Choices(
                    bert_heads=config["bert"]["num_attention_heads"],
                    taps=tuple(config["select_layer_list"]),
                    lora_alpha=config["lora"]["lora_alpha"],
                    low_res=config["seg"]["low_res_mask_size"],
                    dtype="float32",
                ),
            )
            made[state] = out
        return made[state]

    return make


@pytest.fixture(scope="session")
def load(checkpoint):
    """state -> (model, parameters); rematerialisation off, because it only costs compile time here."""
    loaded = {}

    def get(state: str):
        if state not in loaded:
            model, params, config, _ = run_params.load_model(checkpoint(state))
            assert config.compat == "released" and model.cfg.seg_taps == PRESETS["released"].seg_taps
            cfg = dataclasses.replace(model.cfg, llama=dataclasses.replace(model.cfg.llama, remat="none"))
            loaded[state] = cfg.build(), params
        return loaded[state]

    return get


@pytest.fixture(scope="session")
def seg_masks(data, load):
    """state -> (binary, semantic) logits of the mask branch on the states and features of seg.npz."""
    apply = jax.jit(
        lambda module, params, states, features: module.apply({"params": params}, states, features), static_argnums=0
    )
    z = data.arrays("seg.npz")

    @functools.cache
    def get(state: str):
        model, params = load(state)
        return apply(
            SegModule(model.cfg.seg),
            params["seg_module"],
            z["pred_embeddings"],
            (z["image_features.0"], z["image_features.1"]),
        )

    return get


@pytest.fixture(scope="session")
def tokenizer(data) -> Tokenizer:
    return Tokenizer.load(data.folder / "weights/llama")


@pytest.fixture(scope="session")
def longest(data) -> int:
    """Positions of the longest sample; all are padded to it, which saves compilations."""
    config, shapes = data.manifest["config"], data.manifest["arrays"]["samples.npz"]

    def positions(name: str) -> int:
        (text,), audio = shapes[f"{name}.input_ids"][0], shapes[f"{name}.audio"][0]
        frames = next(shapes[key][0][0] for kind in ("video", "image") if (key := f"{name}.{kind}") in shapes)
        windows = audio[0] if len(audio) == 3 else 1
        return text - 2 + frames * config["visual_query_token_nums"] + windows * config["audio_query_token_nums"]

    return max(map(positions, data.json("samples.json")))


@pytest.fixture(scope="session")
def sample(data, tokenizer, longest):
    """(name, masks=..., prompt=..., pads=...) -> Batch of one row from samples.npz, `longest` positions wide."""
    config = data.manifest["config"]
    side = config["image_size"]

    def make(name: str, masks: bool = False, prompt: bool = False, pads: int = 0) -> Batch:
        z = data.arrays("samples.npz", f"{name}.")
        ids = z["prompt_ids"] if prompt else z["input_ids"]
        target = np.zeros(len(ids), bool) if prompt else z["labels"] != -100
        visual = "video" if "video" in z else "image"
        pixels = z[visual].transpose(0, 2, 3, 1)
        frames = ((pixels * np.float64(STD) + np.float64(MEAN)) * 255).astype(np.float32)  # noise, no real pictures
        np.testing.assert_allclose(normalize(jnp.asarray(frames)), pixels, rtol=0, atol=3e-6)
        windows = z["audio"] if z["audio"].ndim == 3 else z["audio"][None]
        visual_rows = np.arange(len(frames) * config["visual_query_token_nums"])
        audio_rows = len(visual_rows) + np.arange(len(windows) * config["audio_query_token_nums"])
        ids, target = (
            np.concatenate([np.full(pads, fill), x])
            for fill, x in ((data.manifest["vocab"]["pad_token_id"], ids), (False, target))
        )
        spliced = tokenizer.expand(
            ids.astype(np.int32), target.astype(bool), {f"<{visual}>": visual_rows, "<audio>": audio_rows}
        )
        real = len(spliced.tokens)
        groups = int(masks)
        task = data.task(name)
        kind = 1 if task in BINARY_TASKS else 2 if task in SEMANTIC_TASKS else 0
        pad = lambda x, fill: np.concatenate([x, np.full(longest - real, fill, x.dtype)])[None]  # noqa: E731
        return Batch(
            tokens=pad(spliced.tokens, 0),
            slots=pad(spliced.slots, -1),
            text_mask=pad(np.ones(real, bool), False),
            loss_mask=pad(spliced.loss_mask, False),
            mask_positions=np.broadcast_to(np.maximum(spliced.mask_positions, 0), (1, groups, 6)).astype(np.int32),
            frames=frames[None],
            frame_mask=np.ones((1, len(frames)), bool),
            fbank=windows[None].astype(np.float32),
            audio_mask=np.ones((1, len(windows)), bool),
            seg_frame=frames[None, :groups],
            seg_target=z["mask"].astype(np.int32)[None] if masks else np.zeros((1, 0, side, side), np.int32),
            seg_kind=np.full((1, groups), kind, np.int32),
            task=np.full(1, list(TASKS).index(task), np.int32),
            index=np.zeros(1, np.int32),
        )

    return make
