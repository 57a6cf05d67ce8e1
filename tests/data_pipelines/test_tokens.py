"""Ids of prompts and targets against the reference's, and placeholders that become feature slots."""

import json
import pickle

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from data_pipelines import tokens
from data_pipelines.tokens import MASK_TOKENS, SPECIAL_TOKENS, Tokenizer, chat_prompt

MASK = "<mask_start>" + "".join(MASK_TOKENS) + "<mask_end>"


@pytest.fixture(scope="session")
def reference(golden):
    return json.loads((golden / "tokenizer.json").read_text())


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_are_those_of_the_slow_llama_tokenizer(golden, reference, legacy):
    tokenizer = Tokenizer.load(golden / "weights" / "llama", legacy=legacy)
    expected = reference["modes"][f"legacy_{legacy}"]
    assert {name: tokenizer.id(name) for name in SPECIAL_TOKENS + MASK_TOKENS} == expected["special_token_2_ids"]
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (expected["len_after"], expected["pad_token_id"])
    for text, ids in zip(reference["texts"], expected["ids"], strict=True):
        assert tokenizer.ids(text) == ids, text


def test_legacy_mode_is_read_from_the_directory_and_saved_with_it(golden, reference, tmp_path):
    tokenizer = Tokenizer.load(golden / "weights" / "llama")
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    expected = reference["modes"][f"legacy_{reference['legacy_in_use']}"]["ids"]
    for text, ids in zip(reference["texts"], expected, strict=True):
        assert tokenizer.ids(text) == again.ids(text) == ids


def test_chat_wrap(reference):
    assert chat_prompt("Hello there ") == reference["chat"]["rendered"]


def test_multimodal_tokens_follow_the_vocabulary_in_the_released_order(tokenizer):
    ids = [tokenizer.id(name) for name in SPECIAL_TOKENS + MASK_TOKENS]
    assert ids == list(range(tokenizer.base, tokenizer.base + 17))
    assert tokenizer.vocab_size == tokenizer.base + 17
    assert tokenizer.mask_ids == tuple(ids[-6:])


def test_tiny_tokenizer_is_lossless_and_splits_digits(tokenizer, tmp_path):
    for text in ["The dog barks from 0 to 8.", " two  spaces ", "naïve 東京 😀\n", "<event> x </event>", "128,64"]:
        assert tokenizer.decode(tokenizer.ids(text)) == text
    assert len(tokenizer.ids("answer")) <= 2
    assert len(tokenizer.ids("2048")) == 4
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).ids("from 0") == pickle.loads(pickle.dumps(tokenizer)).ids("from 0")


def test_encode_marks_the_target_and_ends_it(tokenizer):
    ids, is_target = tokenizer.encode("Hi.", "two")
    prompt, no_target = tokenizer.encode("Hi.")
    np.testing.assert_array_equal(ids[~is_target], prompt)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and not no_target.any()
    assert tokenizer.decode(ids[is_target]) == "two"


def test_decode_stops_at_the_end_and_keeps_mask_tokens(tokenizer):
    ids = tokenizer.ids(f"It is {MASK}.</s> more")
    assert tokenizer.decode(ids) == "It is " + "".join(MASK_TOKENS) + "."
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"It is {MASK}.</s> more"


def test_expand_replaces_placeholders_by_rows(tokenizer):
    video, audio = tokenizer.id("<video>"), tokenizer.id("<audio>")
    ids = np.array([7, video, 8, audio, 9], np.int32)
    out = tokenizer.expand(ids, np.arange(5) == 4, {"<video>": np.arange(3), "<audio>": np.array([10, 11])})
    assert out.tokens.tolist() == [7, video, video, video, 8, audio, audio, 9]
    assert out.slots.tolist() == [-1, 0, 1, 2, -1, 10, 11, -1]
    assert out.loss_mask.tolist() == [False] * 7 + [True]
    assert out.mask_positions.tolist() == [-1] * 6
    twice = tokenizer.expand(ids[[1, 0, 1]], np.zeros(3, bool), {"<video>": np.arange(3), "<audio>": np.arange(0)})
    assert twice.slots.tolist() == [0, 1, 2, -1, 0, 1, 2]
    assert tokenizer.length(ids[[1, 0, 1]], {"<video>": np.arange(3)}) == 7


def test_mask_positions_predict_the_mask_tokens_of_the_target(tokenizer):
    ids, is_target = tokenizer.encode(f"<video> What is {MASK}?", f"It is {MASK}.")
    out = tokenizer.expand(ids, is_target, {"<video>": np.arange(12)})
    assert out.tokens[out.mask_positions + 1].tolist() == list(tokenizer.mask_ids)
    assert out.loss_mask[out.mask_positions + 1].all()
    ids, is_target = tokenizer.encode(f"<video> What is {MASK}?", f"It is {MASK}. {MASK}")
    again = tokenizer.expand(ids, is_target, {"<video>": np.arange(12)})
    np.testing.assert_array_equal(again.mask_positions, out.mask_positions)  # the first of each


def test_bad_tokenizers(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    for content, problem in (
        ("{}", r"tokenizer.json \[model\]: is missing"),
        ('{"model": {}}', "tokenizer.json"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=problem):
            Tokenizer.load(tmp_path)


def test_command_line_trains_from_examples(tmp_path):
    record = {"id": "a", "task": "avqa", "instruction": "How many drums?", "target": "So the answer is 2."}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as done:
        tokens.main(["--corpus", str(tmp_path / "train.jsonl"), "--out", str(out), "--vocab-size", "300"])
    assert done.value.code == 0
    assert Tokenizer.load(out).decode(Tokenizer.load(out).ids("drums")) == "drums"


HOSTILE = {  # what of a tokenizer.json is replaced
    "a piece of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nothing replaced": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
    "growth": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        }
    },
    "a table cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "no table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "\u00e9"}},
    "chance": {"model": {"dropout": 0.5}},
    "a merge of no token": {"model": {"merges": [["a", "b" * 40]]}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_tokenizer_that_would_end_the_process_or_draw_ids_is_refused(what, tokenizer, tmp_path, capfd):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    found = json.loads(file.read_text())
    for key, value in HOSTILE[what].items():
        found[key] = found[key] | value if key == "model" else value
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"tokenizer.json"):
        Tokenizer.load(file)
    assert capfd.readouterr().err == ""  # the library says that it panics


@pytest.mark.parametrize(
    "settings",
    [
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 1}},
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}},
        {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        },
    ],
)
def test_texts_are_neither_cut_nor_filled(settings, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert Tokenizer.load(file).ids("How many dogs bark?") == tokenizer.ids("How many dogs bark?")
