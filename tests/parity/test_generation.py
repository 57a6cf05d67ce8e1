"""Greedy tokens, their scores, mask-token states and masks are the reference's.

Media of each shape are encoded by a program of their own; one program generates for all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.generate import GenerateOptions, generate


def text_logits(model, batch, features):
    """Teacher-forced logits float32[B,L,V] with the media's rows `features` [B,R,D]."""
    x = model.splice(batch, [features])
    return model.logits(model.llama(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))[0])


_generate = jax.jit(generate, static_argnums=(0, 3))
_features = jax.jit(
    lambda model, params, frames, fbank: model.apply({"params": params}, frames, fbank, method="features"),
    static_argnums=0,
)
_logits = jax.jit(
    lambda model, params, batch, features: model.apply({"params": params}, batch, features, method=text_logits),
    static_argnums=0,
)
_masks = jax.jit(
    lambda model, params, states, picture: model.apply({"params": params}, states, picture, method="masks"),
    static_argnums=0,
)


def new_tokens(output_ids: np.ndarray, tokenizer) -> np.ndarray:
    """The reference's sequence without the `<s>` that transformers 4.37 puts in front."""
    assert output_ids[0] == tokenizer.bos_id
    return output_ids[1:]


@pytest.fixture(scope="module")
def answer(data, tokenizer):
    """(model, parameters, prompt, expected tokens, dictated=...) -> (Generation, logits that chose each token)."""
    steps = max(len(row) for case in data.json("generate.json").values() for row in case["ids"])
    options = GenerateOptions(
        eos_id=tokenizer.eos_id, pad_id=tokenizer.eos_id, mask_ids=tokenizer.mask_ids, max_new_tokens=steps
    )

    def run(model, params, batch, expected, dictated: bool = False):
        features = _features(model, params, batch.frames, batch.fbank)
        features = jnp.pad(features, ((0, 0), (0, batch.tokens.shape[1] - features.shape[1]), (0, 0)))
        batch = batch.replace(frames=batch.frames[:, :0], fbank=batch.fbank[:, :0], seg_frame=batch.seg_frame[:, :0])
        length, count = int(batch.text_mask.sum()), len(expected)
        forced = np.full((1, steps), tokenizer.eos_id, np.int32)  # after what the reference generated
        forced[0, :count] = expected if dictated else -1
        found = _generate(model, params, batch, options, None, forced, features)
        longer = {
            name: np.pad(getattr(batch, name), ((0, 0), (0, steps)), constant_values=fill)
            for name, fill in (("tokens", 0), ("slots", -1))
        }
        longer["tokens"][0, length : length + count] = expected
        logits = _logits(model, params, batch.replace(**longer), features)[0]
        return found, logits[length - 1 : length - 1 + count]

    return run


def test_greedy_text(text_case, data, load, sample, tokenizer, answer):
    """Names like 'avqa_under_avs_weights' say the weights; 'ntp' are the usual ones."""
    z, record = data.arrays("generate.npz", f"{text_case}."), data.json("generate.json")[text_case]
    model, params = load(text_case.partition("_under_")[2].removesuffix("_weights") or "ntp")
    batch = sample(record["samples"][0], prompt=True)
    assert z["attention_mask_built_by_prepare"].shape[1] == batch.text_mask.sum()
    expected = new_tokens(z["output_ids"][0], tokenizer)
    found, logits = answer(model, params, batch, expected)
    np.testing.assert_array_equal(found.tokens[0, : len(expected)], expected)
    text = record["text_skip"][0]  # the slow tokenizer doubles spaces around added tokens
    assert "".join(tokenizer.decode(expected).split()) == "".join(text.split())
    if "scores" in z:
        data.close(logits[:, : z["scores"].shape[2]], z["scores"][0], "llama.scores")


def test_left_padded_batch(batch_case, data, load, sample, tokenizer, answer):
    """The released scripts let generation attend to left pads: with the pads written into the prompt, the ids agree."""
    z, names = data.arrays("generate.npz", f"{batch_case}."), data.json("generate.json")[batch_case]["samples"]
    model, params = load("ntp")
    width = z["attention_mask_built_by_prepare"].shape[1]
    for row, name in enumerate(names):
        pads = int((z["attention_mask_built_by_prepare"][row] == 0).sum())
        batch = sample(name, prompt=True, pads=pads)
        assert batch.text_mask.sum() == width
        expected = new_tokens(z["output_ids"][row], tokenizer)
        found, logits = answer(model, params, batch, expected)
        length = int(found.lengths[0])
        np.testing.assert_array_equal(found.tokens[0, :length][: len(expected)], expected[:length])
        if "scores" in z:
            data.close(logits[:length, : z["scores"].shape[2]], z["scores"][row][:length], "llama.scores")


def test_mask_tokens_and_masks(mask_case, data, load, sample, tokenizer, answer):
    z, record = data.arrays("generate_avs.npz", f"{mask_case}."), data.json("generate.json")[mask_case]
    model, params = load("avss" if data.task(record["sample"]) == "avss" else "avs")
    batch = sample(record["sample"], prompt=True, masks=True)
    expected = new_tokens(z["output_ids"][0], tokenizer)
    if "forced_tokens" in z:
        np.testing.assert_array_equal(expected, z["forced_tokens"][: len(expected)])
    found, _ = answer(model, params, batch, expected, dictated="forced_tokens" in z)
    np.testing.assert_array_equal(found.tokens[0, : len(expected)], expected)
    assert found.has_mask[0, 0] == record["has_pred_masks"]
    if not record["has_pred_masks"]:
        return
    data.close(found.mask_states[:, 0], z["pred_embeddings"], "llama.hidden_states")

    binary, semantic = _masks(model, params, found.mask_states[:, 0], batch.seg_frame[:, 0])
    if "pred_masks" in z:
        data.close(binary, z["pred_masks"], "seg.pred_masks")
        np.testing.assert_array_equal(binary > 0, z["pred_masks"] > 0)
    else:
        data.close(semantic[0, ::10], z["pred_masks.ch::10"], "seg.pred_masks")
        np.testing.assert_array_equal(semantic[0].argmax(0), z["pred_masks.argmax"])
