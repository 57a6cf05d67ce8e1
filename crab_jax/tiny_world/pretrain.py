"""Warm up the tiny model: a stand-in for the pre-training of CLIP, BEATs and LLaMA.

    python -m crab_jax.warmup --data runs/scenes --out runs/warmup

Four short trainings on the train split of the generated scenes, never on other splits:
1. CLIP learns which instrument covers each patch of a frame, and the box of that instrument;
2. BEATs learns which instruments sound in a window, and how loud;
3. LLaMA (all parameters) learns every task's language, with the feature rows replaced by embedded rows of the scene
   table (what is visible where, what sounds how loud): it reads about scenes that it can neither see nor hear;
4. the Q-Formers learn to produce these rows from pictures and sound (a stand-in for language-aligned encoders).
The result is a packed model from which the paper's stages start. LoRA and mask decoder stay as initialised.
With --start, LLaMA continues from that of an earlier warm start, for half the steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from crab_jax import defaults, losses, optim
from crab_jax.aot import compile_cache
from crab_jax.checkpoints.models import load_tree, save_packed, save_tree
from crab_jax.checkpoints.stored import load_params
from crab_jax.config import RunConfig, resolve
from crab_jax.io.bounds import Real, path
from crab_jax.io.errors import CommandLine
from crab_jax.io.locks import locked
from crab_jax.io.progress import Progress
from crab_jax.models.beats import Beats
from crab_jax.models.clip import Clip, normalize
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import Llama
from crab_jax.models.qformer import QFormer, QFormerConfig
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.tasks import TASKS
from data_pipelines import batching
from data_pipelines.decoded import cache_in
from data_pipelines.examples import Example
from data_pipelines.fbank import SINGLE
from data_pipelines.sources import scene_graph, scene_media, scenes
from data_pipelines.tokens import Tokenizer

KINDS = len(scene_graph.KINDS)
SLOTS = len(scene_graph.SLOTS)  # visual rows per frame
AUDIO_ROWS = 2  # audio rows per window
BUMP = 8.0  # width of the Reader's position features, in BOX_SPACE
GRID = 8  # side of the coarse map predicted from the states of mask tokens
BOXES = 5  # seconds per scene with a box question; digits are learned most slowly
NOISE = 0.1  # relative to the rows, so that LLaMA learns to read approximate rows
STEPS = {"clip": 2000, "beats": 800, "llama": 5000, "visual": 5000, "audio": 2000}
CLIPS = 1500  # scenes whose media are decoded for the encoders and Q-Formers
LORA_OR_NOT = ((r".*/lora_.*",), (r"(?!.*/lora_).*",))  # patterns of LLaMA's parameters
Arrays = dict[str, np.ndarray]


class Reader(nn.Module):
    """Embeds rows of the scene table as LLM rows, as many per second as the Q-Formers give.

    what [...,3,KINDS] and where [...,3,4] of the left, middle and right thing -> [...,3,D]; loudness [...,KINDS] (0
    silent) -> [...,2,D].
    """

    width: int

    @nn.compact
    def __call__(self, table: Arrays) -> tuple[jax.Array, jax.Array]:
        """Return (visual rows [...,3,D], audio rows [...,2,D]) of a table."""
        seen = table["what"].max(-1, keepdims=True)
        # Bumps about as wide as a Q-Former's accuracy: finer detail would be read here and missing later.
        distance = table["where"][..., None] - jnp.arange(0, scene_graph.BOX_SPACE + 1, 2 * BUMP)
        bumps = jnp.exp(-((distance / BUMP) ** 2) / 2).reshape(*distance.shape[:-2], -1)
        loudness = table["loudness"]
        visual = self.rows("visual", 1, jnp.concatenate([table["what"], bumps * seen, seen], -1))
        audio = self.rows("audio", AUDIO_ROWS, jnp.concatenate([(loudness > 0).astype(loudness.dtype), loudness], -1))
        return visual[..., 0, :], audio

    def rows(self, name: str, count: int, x: jax.Array) -> jax.Array:
        """Return `count` rows [...,count,D] of features x [...,C] by a two-layer MLP."""
        x = nn.gelu(nn.Dense(2 * self.width, name=f"{name}_in")(x))
        x = nn.Dense(count * self.width, kernel_init=nn.initializers.normal(0.02), name=f"{name}_out")(x)
        return x.reshape(*x.shape[:-1], count, self.width)


def fit(
    name: str, params: Any, loss: Callable[[Any, Any], jax.Array], batches: Iterator[Any], steps: int, lr: float
) -> Any:
    """Minimise `loss(params, batch)` by AdamW with warm-up and cosine decay, and return the parameters.

    Progress lines are printed.
    """
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0, lr, min(100, steps // 10 + 1), steps), b2=0.98, weight_decay=0.01
        ),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, began, values = tx.init(params), time.monotonic(), []
    for number in range(1, steps + 1):
        params, opt, value = step(params, opt, next(batches))
        values.append(value)
        if number % max(1, steps // 20) == 0 or number == steps:
            mean = float(np.mean(jax.device_get(values)))
            rate = number / (time.monotonic() - began)
            print(
                f"{name} {number}/{steps}  loss {mean:.4f}  {rate:.2f} step/s  eta {(steps - number) / rate:.0f} s",
                flush=True,
            )
            values = []
    return params


def draw(rng: np.random.Generator, size: int, count: int, pick: Callable[[np.ndarray], Any]) -> Iterator[Any]:
    """Yield endless batches `pick(indices)` of random indices below `size`."""
    while True:
        yield pick(rng.integers(0, size, count))


def table_of(scene: scene_graph.Scene) -> Arrays:
    """Return the visible things of each second (left, middle, right), their boxes, and the loudness of each instrument.

    what f32[10,3,KINDS] one-hot, zero where nothing is seen; where f32[10,3,4] boxes; loudness f32[10,KINDS].
    """
    table = scene_graph.scene_table(scene)
    what = np.zeros((scene_graph.SECONDS, SLOTS, KINDS), np.float32)
    where = np.zeros((scene_graph.SECONDS, SLOTS, 4), np.float32)
    for thing in scene.visible:
        slot, kind = scene_graph.SLOTS.index(thing.slot), scene_graph.KINDS.index(thing.kind)
        what[:, slot, kind] = table["visible"][:, kind]
        where[:, slot] = table["box"][:, kind]
    return {"what": what, "where": where, "loudness": table["loudness"]}


def load_clips(root: Path, folders: list[str], cfg: batching.DataConfig, tokenizer: Any) -> Arrays:
    """Return the decoded media and tables of N scenes.

    frames uint8[N,10,H,W,3], fbank f32[N,10,98,128], kinds uint8[N,10,H,W] (instrument per pixel), box
    f32[N,10,KINDS,4] (of each instrument, relative to the picture size), and the arrays of `table_of`.
    """
    rows: list[Arrays] = []
    prompt = TASKS["ave"].instruction()
    for folder in Progress("clips", len(folders)).over(folders):
        example = Example(id=folder, task="ave", instruction=prompt, video=f"{folder}/clip.mp4")
        arrays = batching.load(example, root, tokenizer, cfg)
        scene = scene_graph.load(root / folder / "scene.json")
        kinds = np.stack(
            [
                np.asarray(Image.fromarray(k.astype(np.uint8)).resize((cfg.image_size,) * 2, Image.Resampling.NEAREST))
                for k in scene_media.occupancy(root, scene)
            ]
        )
        box = scene_graph.scene_table(scene)["box"] / scene_graph.BOX_SPACE
        rows.append(
            {"frames": arrays["frames"], "fbank": arrays["fbank"], "kinds": kinds, "box": box, **table_of(scene)}
        )
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def warm_clip(cfg: CrabConfig, data: Arrays, steps: int, rng: np.random.Generator) -> Any:
    """Return CLIP parameters trained to predict each patch's share of every instrument, and the instruments' boxes.

    Without the boxes, the last layers lose the position of a patch, and no later module can recover it.
    """
    clip, head = Clip(cfg.clip), nn.Dense(KINDS + 1 + 4)
    grid, patch = cfg.clip.image_size // cfg.clip.patch_size, cfg.clip.patch_size
    frames = data["frames"].reshape(-1, *data["frames"].shape[2:])
    kinds = data["kinds"].reshape(-1, grid, patch, grid, patch)
    boxes = data["box"].reshape(-1, KINDS, 4)

    def pick(index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        one_hot = kinds[index][..., None] == np.arange(KINDS + 1)
        share = one_hot.mean((2, 4), dtype=np.float32).reshape(len(index), grid * grid, KINDS + 1)
        return frames[index], share, boxes[index]

    def loss(params: Any, batch: Any) -> jax.Array:
        pictures, share, boxes = batch
        taps: Any = clip.apply({"params": params["clip"]}, normalize(pictures))
        predicted: Any = head.apply({"params": params["head"]}, taps[-1])
        things = share[..., 1:]  # every thing in a patch contributes to the box loss by the share it covers
        distance = jnp.abs(predicted[..., None, KINDS + 1 :] - boxes[:, None]).sum(-1)
        box_loss = (distance * things).sum() / jnp.maximum(things.sum(), 1)
        total: jax.Array = box_loss + optax.softmax_cross_entropy(predicted[..., : KINDS + 1], share).mean()
        return total

    keys = jax.random.split(jax.random.key(1))
    params = {
        "clip": nn.unbox(clip.init(keys[0], normalize(jnp.asarray(frames[:1])))["params"]),
        "head": head.init(keys[1], jnp.zeros((1, cfg.clip.width)))["params"],
    }
    return fit("clip", params, loss, draw(rng, len(frames), 32, pick), steps, 1e-3)["clip"]


def warm_beats(cfg: CrabConfig, data: Arrays, steps: int, rng: np.random.Generator) -> Any:
    """Return BEATs parameters trained to predict which instruments sound in a window, and how loud."""
    beats, head = Beats(cfg.beats), nn.Dense(2 * KINDS)
    fbank = data["fbank"].reshape(-1, *data["fbank"].shape[2:])
    loudness = data["loudness"].reshape(-1, KINDS)

    def loss(params: Any, batch: Any) -> jax.Array:
        encoded: Any = beats.apply({"params": params["beats"]}, batch[0])
        scores: Any = head.apply({"params": params["head"]}, encoded.mean(1))
        presence, level = jnp.split(scores, 2, -1)
        sounding = (batch[1] > 0).astype(jnp.float32)
        error = (sounding * (level - batch[1]) ** 2).sum() / jnp.maximum(sounding.sum(), 1)
        total: jax.Array = optax.sigmoid_binary_cross_entropy(presence, sounding).mean() + error
        return total

    keys = jax.random.split(jax.random.key(2))
    params = {
        "beats": nn.unbox(beats.init(keys[0], fbank[:1])["params"]),
        "head": head.init(keys[1], jnp.zeros((1, cfg.beats.width)))["params"],
    }
    return fit(
        "beats", params, loss, draw(rng, len(fbank), 64, lambda index: (fbank[index], loudness[index])), steps, 1e-3
    )["beats"]


def mask_summary(table: Arrays, example: Example) -> np.ndarray:
    """Return a summary of an example's mask: its instruments f32[KINDS], then a GRID x GRID map, row by row.

    The map has the share of each cell that the boxes of the instruments cover.
    """
    names = example.meta["objects"] if "objects" in example.meta else [example.meta["object"]]
    kinds = np.array([kind in names for kind in scene_graph.KINDS], np.float32)
    low = np.arange(GRID) * (scene_graph.BOX_SPACE / GRID)
    high, map_ = low + scene_graph.BOX_SPACE / GRID, np.zeros((GRID, GRID))
    for what, (x1, y1, x2, y2) in zip(table["what"][example.second], table["where"][example.second], strict=True):
        across, down = (np.clip(np.minimum(high, b) - np.maximum(low, a), 0, None) for a, b in ((x1, x2), (y1, y2)))
        map_ += (what @ kinds) * np.outer(down, across) / (high[0] - low[0]) ** 2
    return np.concatenate([kinds, np.minimum(map_, 1).ravel()]).astype(np.float32)


def text_arrays(
    examples: list[Example], scene_of: dict[str, int], tables: Arrays, tokenizer: Tokenizer, cfg: batching.DataConfig
) -> list[Arrays]:
    """Return tokens, slots and targets of all examples, stacked per bucket, with their scenes and seconds.

    seconds int[N,2]: the second that a picture and an audio window show, -1 when all ten are shown. states int[N,6]:
    the positions that predict mask tokens, -1 without; pointed f32[N,KINDS+GRID*GRID]: `mask_summary`.
    """
    groups: dict[batching.Bucket, list[Arrays]] = {}
    for example in examples:
        bucket = batching.bucket_for(example, tokenizer, cfg)
        arrays = batching.text_arrays(example, tokenizer, cfg, bucket)
        seconds = [example.second if alone else -1 for alone in (example.image, example.windows in SINGLE)]
        scene = scene_of[example.meta["scene"]]
        states, shown = np.full(6, -1), np.zeros(KINDS + GRID * GRID, np.float32)
        if bucket.masks:
            states = arrays["mask_positions"][0]
            shown = mask_summary({name: values[scene] for name, values in tables.items()}, example)
        groups.setdefault(bucket._replace(masks=0), []).append(
            {
                "tokens": arrays["tokens"],
                "slots": arrays["slots"],
                "targets": arrays["loss_mask"],
                "seconds": np.array(seconds),
                "states": states,
                "pointed": shown,
                "scene": np.array(scene),
            }
        )
    return [{key: np.stack([row[key] for row in rows]) for key in rows[0]} for rows in groups.values()]


def reader_batches(groups: list[Arrays], tables: Arrays, size: int, rng: np.random.Generator) -> Iterator[Arrays]:
    """Yield endless batches, each from one bucket, drawn by its share of the examples."""
    shares = np.array([len(group["tokens"]) for group in groups], float)
    while True:
        group = groups[rng.choice(len(groups), p=shares / shares.sum())]
        index = rng.integers(0, len(group["tokens"]), size)
        batch = {key: values[index] for key, values in group.items() if key not in ("scene", "seconds")}
        scene, seconds = group["scene"][index], group["seconds"][index]

        def shown(values: np.ndarray, second: np.ndarray, scene: np.ndarray = scene) -> np.ndarray:
            values = values[scene]
            return (
                values if second[0] < 0 else np.take_along_axis(values, second.reshape(-1, *[1] * (values.ndim - 1)), 1)
            )

        yield {
            **batch,
            "what": shown(tables["what"], seconds[:, 0]),
            "where": shown(tables["where"], seconds[:, 0]),
            "loudness": shown(tables["loudness"], seconds[:, 1]),
            "seed": np.array(rng.integers(2**31)),
        }


def warm_llama(
    cfg: CrabConfig, groups: list[Arrays], tables: Arrays, steps: int, rng: np.random.Generator, start: Any = None
) -> Any:
    """Return {"llama", "reader"} parameters trained to answer every task's prompts from scene tables.

    An auxiliary loss has the states that predict mask tokens also predict `mask_summary`, through a linear map that is
    then dropped: a language model that only writes would make these states all alike.
    """
    llama, reader, summarise = Llama(cfg.llama, None), Reader(cfg.llama.hidden), nn.Dense(KINDS + GRID * GRID)

    def forward(module: Llama, rows: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        taken = jnp.take_along_axis(rows, jnp.maximum(batch["slots"], 0)[..., None], axis=1)
        x = jnp.where((batch["slots"] >= 0)[..., None], taken, module.embed(batch["tokens"]))
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden = module(x, positions)[0]
        return module.logits(hidden), hidden

    def loss(params: Any, batch: Any) -> jax.Array:
        read: Any = reader.apply({"params": params["reader"]}, batch)  # (visual, audio)
        rows = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in read], 1)
        noise = jax.random.normal(jax.random.key(batch["seed"]), rows.shape) * NOISE
        rows = rows + noise * jax.lax.stop_gradient(rows.std())
        output: Any = llama.apply({"params": params["llama"]}, rows, batch, method=forward)
        logits, hidden = output
        term = losses.text_loss(logits, batch["tokens"], batch["targets"], jnp.ones(len(logits), bool))
        states = jnp.take_along_axis(hidden, jnp.maximum(batch["states"], 0)[..., None], axis=1)
        predicted: Any = summarise.apply({"params": params["summary"]}, states)
        error = optax.sigmoid_binary_cross_entropy(
            predicted, jnp.broadcast_to(batch["pointed"][:, None], predicted.shape)
        )
        what, where = jnp.split(error, [KINDS], -1)
        masked = (batch["states"] >= 0).astype(jnp.float32)
        summary_loss = ((what.mean(-1) + where.mean(-1)) * masked).sum() / jnp.maximum(masked.sum(), 1)
        total: jax.Array = term.sum / term.number + summary_loss
        return total

    batches = reader_batches(groups, tables, 16, rng)
    first, keys = next(batches), jax.random.split(jax.random.key(3), 3)
    rows = jnp.zeros((len(first["tokens"]), int(first["slots"].max()) + 1, cfg.llama.hidden))
    params = {
        "reader": reader.init(keys[0], first)["params"],
        "llama": start or nn.unbox(llama.init(keys[1], rows, first, method=forward)["params"]),
        "summary": summarise.init(keys[2], jnp.zeros((1, cfg.llama.hidden)))["params"],
    }
    return fit("llama", params, loss, batches, steps, 2e-3)


def encoded(encode: Callable[[jax.Array], Any], inputs: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Return `encode` of every input [N,...], 256 at a time."""
    step = jax.jit(encode)
    return np.concatenate([np.asarray(step(inputs[at : at + 256]), dtype) for at in range(0, len(inputs), 256)])


def warm_bridge(
    name: str, cfg: QFormerConfig, features: np.ndarray, rows: np.ndarray, steps: int, rng: np.random.Generator
) -> Any:
    """Return Q-Former parameters trained to regress the Reader's rows [N,Q,D] from an encoder's features [N,T,C]."""
    qformer = QFormer(cfg)
    spread = rows.std()

    def loss(params: Any, batch: Any) -> jax.Array:
        out: Any = qformer.apply({"params": params}, batch[0].astype(jnp.float32))
        return jnp.mean(((out - batch[1]) / spread) ** 2)

    params = nn.unbox(qformer.init(jax.random.key(4), features[:1].astype(np.float32))["params"])
    return fit(name, params, loss, draw(rng, len(rows), 64, lambda index: (features[index], rows[index])), steps, 2e-3)


def trained_or_saved(folder: Path, name: str, train: Callable[[], Any]) -> Any:
    """Return the parameters of one training, from `folder` if an earlier run saved them there."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        save_tree(file, train())
    return load_tree(file)


def warm_up(root: Path, out: Path, config: RunConfig, scale: float, start: Path | None) -> None:
    """Run all four trainings on `root`'s train split and write a packed model to `out`.

    start: a packed model from whose LLaMA the third training continues.
    """
    cfg, parts = config.model, out / "parts"
    tokenizer, decode = (
        run_folder.tokenizer_of(config),
        dataclasses.replace(config.data, cache_dir=cache_in(out.parent)),
    )
    boxes = scenes.examples(root, "train", tasks=["arig"], per_scene={"arig": BOXES})
    examples = [example for example in run_data.read_examples(root, "train") if example.task != "arig"] + boxes
    folders = sorted({example.meta["scene"] for example in examples})
    steps = {name: max(4, int(n * scale)) for name, n in STEPS.items()}
    before = None
    if start:
        before = optim.split(
            jax.tree.map(lambda x: np.asarray(x, np.float32), load_params(start))["llama"], *LORA_OR_NOT
        )[1]
        steps["llama"] //= 2

    def rng(number: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, number])

    def read() -> Any:
        tables = [table_of(scene_graph.load(root / folder / "scene.json")) for folder in folders]
        stacked = {key: np.stack([table[key] for table in tables]) for key in tables[0]}
        groups = text_arrays(examples, {folder: i for i, folder in enumerate(folders)}, stacked, tokenizer, decode)
        return warm_llama(cfg, groups, stacked, steps["llama"], rng(0), before)

    data = load_clips(root, folders[:CLIPS], decode, tokenizer)
    frames, fbank = (data[key].reshape(-1, *data[key].shape[2:]) for key in ("frames", "fbank"))
    shown = {key: data[key].reshape(-1, *data[key].shape[2:]) for key in ("what", "where", "loudness")}
    params, learned = run_params.initial_params(config, cfg.build()), {}
    reading = trained_or_saved(parts, "llama", read)
    learned["llama"] = optim.merge(optim.split(params["llama"], *LORA_OR_NOT)[0], reading["llama"])
    visual, audio = map(np.asarray, Reader(cfg.llama.hidden).apply({"params": reading["reader"]}, shown))
    learned["clip"] = clip = trained_or_saved(parts, "clip", lambda: warm_clip(cfg, data, steps["clip"], rng(1)))
    pictures = encoded(lambda x: Clip(cfg.clip).apply({"params": clip}, normalize(x))[-1], frames, np.float16)
    learned["vl_projector"] = trained_or_saved(
        parts,
        "vl_projector",
        lambda: warm_bridge("visual q-former", cfg.visual, pictures, visual, steps["visual"], rng(3)),
    )
    learned["beats"] = beats = trained_or_saved(parts, "beats", lambda: warm_beats(cfg, data, steps["beats"], rng(2)))
    sounds = encoded(lambda x: Beats(cfg.beats).apply({"params": beats}, x), fbank, np.float16)
    learned["al_projector"] = trained_or_saved(
        parts, "al_projector", lambda: warm_bridge("audio q-former", cfg.audio, sounds, audio, steps["audio"], rng(4))
    )
    save_packed(out, params | learned, config.to_dict(), tokenizer=tokenizer)


def main() -> None:
    """Run `python -m crab_jax.warmup`."""
    parser = CommandLine(__doc__)
    parser.add_argument("--data", type=path, required=True, help="root of generated scenes")
    parser.add_argument("--out", type=path, required=True, help="folder of the packed result")
    parser.add_argument("--scale", type=Real(1e-4, 1e3), default=1.0, help="share of the steps")
    parser.add_argument("--start", type=path, help="a packed model from whose language model to continue")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()
    compile_cache.enable()
    config = resolve(defaults.tiny())
    with locked(args.out):
        warm_up(args.data, args.out, config, args.scale, args.start)
