"""Spliced sequences: embeddings, labels, positions, mask-token positions and scale features of the reference."""

import jax
import numpy as np
import pytest

# Batches of the reference (part of the layout, no file says it): the samples of each, its weights, and whether it holds
# prompts alone.
GROUPS = {
    "avs_mix": (("avqa", "s4"), "avs", False),
    "avs_mix3": (("s4", "avqa", "ref-avs"), "avs", False),
    "ntp_train": (("avqa", "ave"), "ntp", False),
    "ntp_prompt": (("avqa", "ave"), "ntp", True),
    "s4_prompt": (("s4",), "avs", True),
}


@pytest.fixture(scope="module")
def inputs(load):
    compiled = jax.jit(
        lambda model, params, batch: model.apply({"params": params}, batch, method="inputs"), static_argnums=0
    )
    return lambda state, batch: compiled(*load(state), batch)


@pytest.mark.parametrize("group", GROUPS)
def test_rows_are_the_references_after_its_left_padding(group, data, sample, inputs):
    names, state, prompt = GROUPS[group]
    z = data.arrays("prepare.npz", f"{group}.")
    assert len(z["attention_mask"]) == len(names)
    for row, name in enumerate(names):
        masks = "mask_token_mask" in z and data.has_mask(name)
        batch = sample(name, masks=masks, prompt=prompt)
        real = z["attention_mask"][row].astype(bool)
        offset = int((~real).sum())
        assert real[offset:].all() and real.sum() == batch.text_mask.sum()

        embedded, features = inputs(state, batch)
        data.close(embedded[0, : real.sum()], z["inputs_embeds"][row, real], "qformer")
        labels = np.where(batch.loss_mask[0], batch.tokens[0], -100)[: real.sum()]
        np.testing.assert_array_equal(labels, np.full(len(labels), -100) if prompt else z["labels"][row, real])
        np.testing.assert_array_equal(np.arange(real.sum()), z["position_ids"][row, real])
        if masks:
            for scale, feature in enumerate(features):
                data.close(feature[0, 0], z[f"multi_scale_image_features.{scale}"][row], "clip")
            np.testing.assert_array_equal(batch.seg_target[0, 0], z["gt_mask"][row, 0])
            if not prompt:
                np.testing.assert_array_equal(
                    batch.mask_positions[0, 0] + offset, np.flatnonzero(z["mask_token_mask"][row])
                )


def test_no_group_of_the_directory_is_passed_over(data):
    assert {name.split(".")[0] for name in data.manifest["arrays"]["prepare.npz"]} <= set(GROUPS)


def test_tokenised_samples_are_the_references(data, tokenizer):
    """Ids, targets and the special ids in the mode of the directory's tokenizer."""
    records = data.json("samples.json")
    for name, record in records.items():
        if f"{name}.input_ids" in data.omitted["arrays"].get("samples.npz", ()):
            continue
        z = data.arrays("samples.npz", f"{name}.")
        prompt, answer = tokenizer.ids(record["instruction"]), tokenizer.ids(record["output"])
        np.testing.assert_array_equal(prompt, z["prompt_ids"])
        np.testing.assert_array_equal(prompt + answer, z["input_ids"])
        np.testing.assert_array_equal([-100] * len(prompt) + answer, z["labels"])
    vocab = data.manifest["vocab"]
    assert {name: tokenizer.id(name) for name in vocab["special_token_2_ids"]} == vocab["special_token_2_ids"]
    assert (tokenizer.base, tokenizer.vocab_size) == (vocab["base"], vocab["with_mm_tokens"])
    reference = data.json("tokenizer.json")
    expected = reference["modes"][f"legacy_{reference['legacy_in_use']}"]["ids"]
    assert [tokenizer.ids(text) for text in reference["texts"]] == expected
