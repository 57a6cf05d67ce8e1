"""The committed golden directory is small and says what it leaves out of the whole one; every array has its test."""

import os
import re
from pathlib import Path

import numpy as np
import pytest


def test_every_array_of_the_manifest_is_there_or_named_as_left_out(data):
    for file, arrays in data.manifest["arrays"].items():
        if file in data.omitted["files"]:
            assert not (data.folder / file).exists()
            continue
        left_out = set(data.omitted["arrays"].get(file, ()))
        with np.load(data.folder / file) as z:
            assert set(z) | left_out == set(arrays) and not set(z) & left_out, file


def test_the_committed_directory_stays_below_6_mb(data):
    if "CRAB_GOLDEN_DIR" in os.environ:
        pytest.skip("only the committed directory has a limit")
    assert sum(path.stat().st_size for path in data.folder.rglob("*") if path.is_file()) <= 6e6


def test_every_weight_file_is_there_or_named_as_left_out(data):
    recorded = [name for name in data.manifest["file_bytes"] if name.startswith("weights/")]
    assert recorded
    for name in recorded:
        assert (data.folder / name).exists() != (name in data.omitted["files"]), name


@pytest.mark.skipif("CRAB_GOLDEN_DIR" in os.environ, reason="the README is about the arrays that are committed")
def test_the_readme_tells_what_every_file_is(data):
    text = (Path(__file__).parents[1] / "golden" / "README.md").read_text()
    for name in (*data.manifest["arrays"], "samples.json", "tokenizer.json", "manifest.json", "omitted.json"):
        assert f"`{name}`" in text or name in data.omitted["files"], name
    for name in ("9dd8bc7", *(data.manifest["versions"][package] for package in ("torch", "transformers", "numpy"))):
        assert name in text, name


# Every array of a golden directory: file -> {names, as a regular expression: the test that compares it}, or why none.
COMPARED = {
    "samples.npz": {
        r".*\.(input_ids|labels|prompt_ids)": "test_tokenised_samples_are_the_references",
        r".*\.(video|image|audio|mask)": "test_rows_are_the_references_after_its_left_padding",
    },
    "clip.npz": {
        r"pixel_values|hidden_states\.\d+|tap\.\d+|last_hidden_state": "test_clip_taps_and_hidden_states",
        r"pooler_output": "not compared: of the class token, behind the norm that nothing uses",
    },
    "fbank.npz": {r".*": "test_filter_banks"},
    "beats.npz": {
        r".*\.(fbank|out)|rel_.*": "test_beats_at_every_length",
        r".*\.(patch_ln|enc_in|pos_bias|layer\d+)|pos_conv\..*": "test_beats_inside",
        r".*\.predictor_lprobs": "not compared: of the classifier of audio events, which nothing uses",
    },
    "qformer.npz": {r".*\.(in|out)": "test_q_formers", r"visual_t1\.bert_hidden\.\d+": "test_q_former_inside"},
    "lora.npz": {r".*": "test_one_lora_linear_and_its_router"},
    "llama.npz": {r".*": "test_llama_logits_and_hidden_states"},
    "prepare.npz": {r".*": "test_rows_are_the_references_after_its_left_padding"},
    "seg.npz": {
        r"pred_embeddings|image_features\.\d|gt\.\d": "test_released_pooling_of_mask_losses",
        r"avss?\.pred_masks\..*": "test_masks_of_both_kinds",
        r"sample0\..*": "test_the_mask_branch_inside",
        r"dense_pe|pe1_level1": "test_position_features",
    },
    "losses.npz": {
        r"avss?\.mask_loss\..*": "test_released_pooling_of_mask_losses",
        r"[^.]*(\.[^.]*)?": "test_single_terms",
    },
    "metrics.npz": {
        r"mask.*|Fmeasure.*|metric_s.*": "test_mask_metrics",
        r"color\..*": "test_class_metrics",
        r"box\d|c_iou|iou|iou_wh": "test_box_metrics",
        r"avvp\..*": "test_parsing_metrics",
        r"bbox_overlaps_ciou(_32)?": "test_the_box_metric_that_nothing_released_calls",
    },
    "train_step.npz": {
        r".*\.(loss|mask_loss|text_loss)": "test_loss_of_the_mixed_batch",
        r".*\.grad\..*": "test_gradients_element_by_element",
        r"traj\..*": "test_the_adamw_trajectory",
    },
    "generate.npz": {r".*": "test_greedy_text"},
    "generate_avs.npz": {r".*": "test_mask_tokens_and_masks"},
    "media.npz": {
        r"(?!avqa).*": "test_decoded_media",
        r"avqa\.win\d\.fbank": "not compared: of a sound of a minute "
        "that no file holds; test_rows_are_the_references_after_its_left_padding has two-second windows",
    },
}


def test_every_array_is_compared_by_a_test(data):
    tests = set(
        re.findall(
            r"^def (test_\w+)",
            "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py")),
            re.MULTILINE,
        )
    )
    for file, arrays in data.manifest["arrays"].items():
        for name in arrays:
            by = [test for pattern, test in COMPARED[file].items() if re.fullmatch(pattern, name)]
            assert len(by) == 1, f"{file}: {name} is compared by {by}"
            assert by[0] in tests or by[0].startswith("not compared: "), by[0]
