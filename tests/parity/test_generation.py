"""Greedy tokens, their scores, mask-token states and masks are the reference's."""

import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.generate import GenerateOptions, generate

_generate = jax.jit(generate, static_argnums=(0, 3))
_forward = jax.jit(lambda model, params, batch: model.apply({"params": params}, batch).logits, static_argnums=0)
_masks = jax.jit(lambda model, params, states, picture: model.apply(
    {"params": params}, states, picture, method="masks"), static_argnums=0)


def options(tokenizer, steps: int) -> GenerateOptions:
    return GenerateOptions(eos_id=tokenizer.eos_id, pad_id=tokenizer.eos_id, mask_ids=tokenizer.mask_ids,
                           max_new_tokens=steps)


def new_tokens(output_ids: np.ndarray, tokenizer) -> np.ndarray:
    """The reference's sequence without the `<s>` that transformers 4.37 puts in front."""
    assert output_ids[0] == tokenizer.bos_id
    return output_ids[1:]


def continued(batch, tokens):
    """The prompt followed by tokens, as one teacher-forced row."""
    n = len(tokens)
    grow = lambda x, tail: np.concatenate([x, tail[None].astype(x.dtype)], axis=1)  # noqa: E731
    return batch.replace(tokens=grow(batch.tokens, tokens), slots=grow(batch.slots, np.full(n, -1)),
                         text_mask=grow(batch.text_mask, np.ones(n)), loss_mask=grow(batch.loss_mask, np.zeros(n)))


def test_greedy_text(text_case, data, load, sample, tokenizer):
    """Names like 'avqa_under_avs_weights' say the weights; 'ntp' are the usual ones."""
    z, record = data.arrays("generate.npz", f"{text_case}."), data.json("generate.json")[text_case]
    model, params = load(text_case.partition("_under_")[2].removesuffix("_weights") or "ntp")
    batch = sample(record["samples"][0], prompt=True)
    assert z["attention_mask_built_by_prepare"].shape[1] == batch.tokens.shape[1]
    expected = new_tokens(z["output_ids"][0], tokenizer)
    found = _generate(model, params, batch, options(tokenizer, len(expected)))
    np.testing.assert_array_equal(found.tokens[0], expected)
    text = record["text_skip"][0]  # the slow tokenizer doubles spaces around added tokens
    assert tokenizer.decode(expected).split() == text.split()
    if "scores" in z:
        logits = _forward(model, params, continued(batch, expected))[0]
        at = batch.tokens.shape[1] - 1 + np.arange(len(expected))
        data.close(logits[at, :z["scores"].shape[2]], z["scores"][0], "llama")


def test_left_padded_batch(batch_case, data, load, sample, tokenizer):
    """The released scripts let generation attend to left pads: with the pads written into the prompt, the ids agree."""
    z, names = data.arrays("generate.npz", f"{batch_case}."), data.json("generate.json")[batch_case]["samples"]
    model, params = load("ntp")
    width = z["attention_mask_built_by_prepare"].shape[1]
    for row, name in enumerate(names):
        pads = int((z["attention_mask_built_by_prepare"][row] == 0).sum())
        batch = sample(name, prompt=True, pads=pads)
        assert batch.tokens.shape[1] == width
        expected = new_tokens(z["output_ids"][row], tokenizer)
        found = _generate(model, params, batch, options(tokenizer, len(expected)))
        length = int(found.lengths[0])
        np.testing.assert_array_equal(found.tokens[0, :length], expected[:length])
        if "scores" in z:
            logits = _forward(model, params, continued(batch, expected))[0]
            at = width - 1 + np.arange(length)
            data.close(logits[at, :z["scores"].shape[2]], z["scores"][row][:length], "llama")


def test_mask_tokens_and_masks(mask_case, data, load, sample, tokenizer):
    z, record = data.arrays("generate_avs.npz", f"{mask_case}."), data.json("generate.json")[mask_case]
    model, params = load("avss" if data.task(record["sample"]) == "avss" else "avs")
    batch = sample(record["sample"], prompt=True, masks=True)
    expected = new_tokens(z["output_ids"][0], tokenizer)
    forced = jnp.asarray(expected, jnp.int32)[None] if "forced_tokens" in z else None
    if forced is not None:
        np.testing.assert_array_equal(expected, z["forced_tokens"][:len(expected)])
    found = _generate(model, params, batch, options(tokenizer, len(expected)), None, forced)
    np.testing.assert_array_equal(found.tokens[0], expected)
    assert found.has_mask[0, 0] == record["has_pred_masks"]
    if not record["has_pred_masks"]:
        return
    data.close(found.mask_states[:, 0], z["pred_embeddings"], "llama")

    binary, semantic = _masks(model, params, found.mask_states[:, 0], batch.seg_frame[:, 0])
    if "pred_masks" in z:
        data.close(binary, z["pred_masks"], "seg")
        np.testing.assert_array_equal(binary > 0, z["pred_masks"] > 0)
    else:
        data.close(semantic[0, ::10], z["pred_masks.ch::10"], "seg")
        np.testing.assert_array_equal(semantic[0].argmax(0), z["pred_masks.argmax"])
