"""The whole model: rows are independent, padding is invisible, and generation computes what training computed."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from crab_jax.generate import GenerateOptions, generate
from crab_jax.models.crab import PARAMETER_GROUPS, Crab
from crab_jax.models.presets import tiny
from crab_jax.runs import run_data, run_params
from crab_jax.training import train_step
from data_pipelines import batching
from data_pipelines.tokens import Tokenizer

LENGTHS = (144, 192, 272)


@pytest.fixture(scope="module")
def setup(scenes_root):
    """(model, params, tokenizer, loader): one layer each, LoRA switched on by non-zero B matrices."""
    sizes = tiny()
    cut = {name: dataclasses.replace(getattr(sizes, name), layers=1) for name in ("beats", "visual", "audio", "llama")}
    model = Crab(dataclasses.replace(sizes, clip=dataclasses.replace(sizes.clip, layers=2, taps=(1, 2, 2)), **cut))
    params = nn.unbox(model.init({"params": jax.random.key(0)}, run_params.init_batch(model))["params"])
    rng = np.random.default_rng(0)

    def filled(path, leaf):
        return jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) if "lora_B" in str(path) else leaf

    params = jax.tree_util.tree_map_with_path(filled, params)
    tokenizer = Tokenizer.load("data_pipelines/tiny_tokenizer.json")
    examples = run_data.read_examples(scenes_root, "train")

    def load(task: str, count: int, lengths=LENGTHS, prompt_only=False) -> batching.Batch:
        config = batching.DataConfig(
            image_size=64, visual_queries=3, audio_queries=2, lengths=lengths, prompt_only=prompt_only
        )
        chosen = [e for e in examples if e.task == task][:count]
        return jax.tree.map(
            jnp.asarray,
            batching.collate(
                (batching.load(e, scenes_root, tokenizer, config, i) for i, e in enumerate(chosen)), len(chosen)
            ),
        )

    return model, params, tokenizer, load


def test_a_batch_is_its_rows_and_padding_is_invisible(setup):
    model, params, _, load = setup
    forward = jax.jit(model.apply)
    both, wide = load("s4", 2, (192,)), load("s4", 2, (272,))
    out, padded = forward({"params": params}, both), forward({"params": params}, wide)
    for row in range(2):
        twice = forward({"params": params}, jax.tree.map(lambda x, row=row: jnp.stack([x[row]] * 2), both))
        real = np.asarray(both.text_mask[row])
        np.testing.assert_allclose(twice.logits[1 - row, real], out.logits[row, real], atol=2e-5)
        np.testing.assert_allclose(twice.binary[1 - row], out.binary[row], atol=2e-4)
        np.testing.assert_allclose(padded.logits[row, :192][real], out.logits[row, real], atol=2e-5)
        np.testing.assert_allclose(padded.semantic[row], out.semantic[row], atol=2e-4)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_of_no_numbers_or_of_padding_alone_changes_no_bit_of_another(setup, row):
    model, params, _, load = setup
    batch, other = load("s4", 2, (192,)), 1 - row
    forward = jax.jit(model.apply)
    out = forward({"params": params}, batch)
    loss_rows = jax.jit(train_step.loss_rows)
    rows = loss_rows(out, batch)
    nothing = jax.tree.map(lambda x: x.at[row].set(jnp.zeros((), x.dtype)), batch).replace(
        slots=batch.slots.at[row].set(-1), index=batch.index.at[row].set(-1)
    )
    for name, changed in (
        ("sound", batch.replace(fbank=batch.fbank.at[row].set(jnp.nan))),
        ("loud", batch.replace(fbank=batch.fbank.at[row].set(3e38))),
        ("padding", nothing),
    ):
        found = forward({"params": params}, changed)
        losses = loss_rows(found, changed)
        for part in ("logits", "hidden", "binary", "semantic"):
            np.testing.assert_array_equal(getattr(found, part)[other], getattr(out, part)[other])
        for part, term in losses.items():
            assert term.sum[other] == rows[part].sum[other], part
        spoiled = not all(np.isfinite(term.sum[row]) for term in losses.values())
        assert spoiled == (name != "padding"), "it is seen, and padding is none"
        finite = train_step.finite_rows(losses, 2)
        assert bool(finite[other]) and bool(finite[row]) != spoiled


@pytest.mark.slow
def test_a_row_of_no_numbers_changes_no_bit_of_the_gradient_of_another(setup):
    model, params, _, load = setup
    batch = load("s4", 2, (192,))

    def loss(fbank):
        rows = train_step.loss_rows(model.apply({"params": params}, batch.replace(fbank=fbank)), batch)
        return sum(term.sum.sum() for term in rows.values())

    gradient = jax.jit(jax.grad(loss))
    whole, spoiled = gradient(batch.fbank), gradient(batch.fbank.at[0].set(jnp.nan))
    np.testing.assert_array_equal(whole[1], spoiled[1])
    assert np.abs(whole[1]).max() > 0 and np.isnan(spoiled[0]).any()


def test_each_slot_takes_its_row_and_text_keeps_its_embedding(setup):
    model, params, _, load = setup
    batch = load("ave", 1)

    def parts(module):
        frames = module.encode_images(batch.frames)[-1]
        return module.inputs(batch)[0], jnp.concatenate([module.visual_rows(frames), module.audio_rows(batch.fbank)], 1)

    x, rows = jax.jit(lambda: model.apply({"params": params}, method=parts))()
    rows = np.asarray(rows[0])
    slots = np.asarray(batch.slots[0])
    np.testing.assert_allclose(x[0][slots >= 0], rows[slots[slots >= 0]], atol=1e-5)
    assert sorted(slots[slots >= 0]) == list(range(len(rows))), "every row is used exactly once"
    table = params["llama"]["embed_tokens"]["embedding"]
    text = (slots < 0) & np.asarray(batch.text_mask[0])
    np.testing.assert_array_equal(x[0][text], table[batch.tokens[0][text]])


def test_generation_of_the_target_gives_the_masks_of_the_teacher_forced_pass(setup):
    model, params, tokenizer, load = setup
    whole, prompt = load("s4", 2, (192,)), load("s4", 2, (192,), prompt_only=True)
    trained = jax.jit(model.apply)({"params": params}, whole)
    steps = int(whole.loss_mask.sum(1).max())
    forced = np.full((2, steps), -1)
    for row in range(2):
        target = np.asarray(whole.tokens[row][whole.loss_mask[row]])
        forced[row, : len(target)] = target
    options = GenerateOptions(tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_ids, max_new_tokens=steps)
    out = jax.jit(generate, static_argnums=(0, 3))(model, params, prompt, options, None, jnp.asarray(forced))
    assert bool(out.has_mask.all())
    states = jnp.take_along_axis(trained.hidden, whole.mask_positions[:, 0, :, None], axis=1)
    np.testing.assert_allclose(out.mask_states[:, 0], states, atol=1e-4)
    masks = jax.jit(lambda states, frames: model.apply({"params": params}, states, frames, method="masks"))
    binary, _ = masks(out.mask_states[:, 0], prompt.seg_frame[:, 0])
    np.testing.assert_allclose(binary, trained.binary[:, 0], atol=1e-3)


def test_silence_and_darkness_change_what_the_language_model_reads(setup):
    model, params, _, load = setup
    batch, inputs = load("ave", 1), jax.jit(lambda batch: model.apply({"params": params}, batch, method="inputs")[0])
    out = inputs(batch)
    for changed in (
        batch.replace(fbank=jnp.full_like(batch.fbank, -2.39)),
        batch.replace(frames=jnp.zeros_like(batch.frames)),
    ):
        assert float(jnp.abs(inputs(changed) - out)[batch.text_mask].max()) > 1e-4


def test_every_parameter_belongs_to_one_group(setup):
    _, params, _, _ = setup
    of = {}
    for path in traverse_util.flatten_dict(params, sep="/"):
        (of[path],) = (
            name for name, patterns in PARAMETER_GROUPS.items() if any(re.fullmatch(one, path) for one in patterns)
        )
    assert set(of.values()) == set(PARAMETER_GROUPS)
    for path, group in of.items():
        part = path.split("/")[0]
        kinds = {"clip": "encoders", "beats": "encoders", "vl_projector": "qformers", "al_projector": "qformers"}
        kinds["llama"] = "lora" if re.search("lora_(A|B|route)$", path) else "llama"
        kinds["seg_module"] = "fourier" if path.endswith("positional_encoding_gaussian_matrix") else "segmentation"
        assert group == kinds[part], path


def test_the_layout_for_generation_has_its_own_language_model_and_the_other_parts_as_they_are(setup):
    model, params, _, load = setup
    other, laid = model.for_generation(params, "int8")
    assert (other.cfg, other.weights) == (model.cfg, "int8")
    assert set(laid) == set(params) and all(laid[name] is params[name] for name in params if name != "llama")
    assert laid["llama"]["layers_0"]["down"]["kernel"].dtype == jnp.int8
    prompt = load("ave", 1, prompt_only=True)
    cache = other.empty_cache(*prompt.tokens.shape)
    hidden, _ = jax.eval_shape(lambda: other.apply({"params": laid}, prompt, cache, method="prefill"))
    assert hidden.shape == (*prompt.tokens.shape, model.cfg.llama.hidden)


def test_a_part_whose_media_a_batch_lacks_is_not_run(setup):
    """So an answer to a question without sound needs no sound encoder, nor its parameters."""
    model, params, _, load = setup
    batch = load("ave", 1)

    def rows(frames, fbank, *without):
        kept = {name: value for name, value in params.items() if name not in without}
        return jax.eval_shape(lambda: model.apply({"params": kept}, frames, fbank, method="features")).shape

    (_, frames), (_, windows) = batch.frames.shape[:2], batch.fbank.shape[:2]
    width = model.cfg.llama.hidden
    assert rows(batch.frames, batch.fbank[:, :0], "beats", "al_projector") == (1, 3 * frames, width)
    assert rows(batch.frames[:, :0], batch.fbank, "clip", "vl_projector") == (1, 2 * windows, width)
    assert rows(batch.frames[:, :0], batch.fbank[:, :0], "beats", "clip") == (1, 0, width)
