"""Ids of LLaMA-2's own tokenizer, whose file may not be committed.

CRAB_LLAMA_TOKENIZER=/path/to/tokenizer.model python -m pytest tests/data_pipelines/test_real_tokenizer.py

The slow LlamaTokenizer of transformers 4.37.2, which the release used, is gone from later ones. `Slow` is what it
documents, on top of sentencepiece; it is first compared with ids that the release's own versions wrote.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from crab_jax.tasks import TASKS
from data_pipelines.tokens import MASK_TOKENS, SPECIAL_TOKENS, Tokenizer, chat_prompt

FILE = os.environ.get("CRAB_LLAMA_TOKENIZER", "")
real = pytest.mark.skipif(not FILE, reason="CRAB_LLAMA_TOKENIZER names no tokenizer.model")
ADDED = ("<unk>", "<s>", "</s>", *SPECIAL_TOKENS, *MASK_TOKENS)
LEGACY = {"absent": {}, "true": {"legacy": True}, "false": {"legacy": False}, "null": {"legacy": None}}
FIELDS = {"avqa": {"question": "How many sounding violin in the video？"}, "ref-avs": {"expression": "The loud One"}}
LABELS = {
    "avqa": {"answer": "more than ten", "reasoning": "I hear  two violins, 3.5 s apart."},
    "ave": {"event": "Male speech, man speaking", "start": 0, "end": 8},
    "avvp": {"audio": [["Frying_(food)", 0, 10]], "visual": [["Dog", 0, 1], ["Dog", 3, 6]]},
    "arig": {"object": "dog", "box": [21, 72, 196, 140]},
    "avcap": {"caption": "naïve café – 東京 😀"},
    **{name: {"objects": ["guitar", "man"], "second": 3} for name in ("s4", "ms3", "avss")},
    "ref-avs": {"expression": "The loud One", "object": "emergency-car", "second": 3},
}


class Slow:
    """LlamaTokenizer(use_fast=False) of transformers 4.37.2 with the 17 tokens of Crab added."""

    def __init__(self, model: Path, legacy: bool):
        stored = proto.ModelProto.FromString(model.read_bytes())
        stored.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=stored.SerializeToString())
        self.legacy, size = legacy, self.pieces.get_piece_size()
        self.added = {name: self.pieces.piece_to_id(name) for name in ADDED[:3]} | {
            name: size + place for place, name in enumerate(ADDED[3:])
        }

    def ids(self, text: str) -> list[int]:
        if not text:
            return []
        text = text if self.legacy else "▁" + text.replace("▁", " ")
        longest = sorted(self.added, key=len, reverse=True)
        parts = [part for part in re.split(f"({'|'.join(map(re.escape, longest))})", text) if part]
        if not self.legacy and len(parts) > 1 and parts[0] == "▁" and parts[1] in self.added:
            parts = parts[1:]
        return [one for part in parts for one in ([self.added[part]] if part in self.added else self._piece(part))]

    def _piece(self, text: str) -> list[int]:
        if self.legacy or not text.startswith(("▁", " ")):
            return self.pieces.encode(text)
        return self.pieces.encode("<unk>" + text)[len(self.pieces.encode("<unk>")) :]


@pytest.fixture(params=LEGACY)
def loaded(request, tmp_path):
    """(our tokenizer, the slow one) of a LLaMA directory whose config says `legacy` in one of the four ways."""
    shutil.copy(FILE, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | LEGACY[request.param]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path), Slow(tmp_path / "tokenizer.model", request.param != "false")


@pytest.mark.parametrize("legacy", [False, True])
def test_the_slow_tokenizer_here_is_the_one_of_the_release(golden, legacy):
    reference = json.loads((golden / "tokenizer.json").read_text())
    slow = Slow(golden / "weights/llama/tokenizer.model", legacy)
    for text, ids in zip(reference["texts"], reference["modes"][f"legacy_{legacy}"]["ids"], strict=True):
        assert slow.ids(text) == ids, text


@pytest.mark.parametrize("said", LEGACY)
def test_legacy_is_true_unless_it_is_said_to_be_false(golden, said, tmp_path):
    """transformers 4.37.2 takes null as true, with a warning."""
    shutil.copy(golden / "weights/llama/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | LEGACY[said]))
    reference = json.loads((golden / "tokenizer.json").read_text())
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "..")
    for tokenizer in (ours, Tokenizer.load(tmp_path / "..")):
        for text, ids in zip(reference["texts"], reference["modes"][f"legacy_{said != 'false'}"]["ids"], strict=True):
            assert tokenizer.ids(text) == ids, text


@real
def test_the_vocabulary_and_the_seventeen_tokens(loaded):
    ours, slow = loaded
    assert (ours.base, ours.vocab_size, ours.bos_id, ours.eos_id) == (32000, 32017, 1, 2)
    assert [ours.id(name) for name in SPECIAL_TOKENS + MASK_TOKENS] == list(range(32000, 32017))
    assert {name: ours.id(name) for name in ADDED} == slow.added


@real
def test_the_chat_wrap(loaded):
    ours, slow = loaded
    text = chat_prompt("Hello there ")
    ids = ours.ids(text)
    assert ids == slow.ids(text) and ids[0] == 1
    assert ids[1:4] == [518 if slow.legacy else 29961, 25580, 29962], "[INST], with a word mark in front of it or not"


@real
@pytest.mark.parametrize("variant", ["train", "test", "quick"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_labels_and_slots_of_every_task(loaded, task, variant):
    ours, slow = loaded
    instruction = TASKS[task].instruction(variant, **FIELDS.get(task, {}))
    target = TASKS[task].target(**LABELS[task])
    ids, is_target = ours.encode(instruction, target)
    assert ids[~is_target].tolist() == slow.ids(chat_prompt(instruction))
    assert ids[is_target].tolist() == slow.ids(target + "</s>")

    rows = {
        name: np.arange(count) + first
        for name, count, first in (("<video>", 320, 0), ("<image>", 32, 0), ("<audio>", 96, 320))
        if name in instruction
    }
    spliced = ours.expand(ids, is_target, rows)
    assert len(spliced.tokens) == len(ids) + sum(len(run) - 1 for run in rows.values()) == ours.length(ids, rows)
    for name, run in rows.items():
        held = spliced.slots[spliced.tokens == ours.id(name)]
        np.testing.assert_array_equal(held, run)
    assert (spliced.slots >= 0).sum() == sum(map(len, rows.values()))
    np.testing.assert_array_equal(spliced.tokens[spliced.loss_mask], ids[is_target])  # the labels
    expected = [ours.id(name) for name in MASK_TOKENS] if TASKS[task].mask_kind != "none" else []
    assert spliced.tokens[spliced.mask_positions + 1].tolist() == expected or (spliced.mask_positions == -1).all()
    shown = ours.decode(ids[is_target])
    assert TASKS[task].parse(shown) is not None and TASKS[task].parse(shown) == TASKS[task].parse(target)


@real
def test_odd_texts(loaded, golden):
    ours, slow = loaded
    texts = json.loads((golden / "tokenizer.json").read_text())["texts"]
    spaces = [f"a{' ' * count}b" for count in range(40)] + ["   ", " a", "I hear  two", " \n \n", "\t\t", "  x  y   z"]
    odd = ["\r\n", "\u3000x", "e\u0301", "a\u200bb", "🏳️‍🌈", "0" * 300, "  <mask_0>  <mask_1>", "</s></s>x", "▁▁a"]
    for text in (*texts, *spaces, *odd):
        assert ours.ids(text) == slow.ids(text), text


@real
def test_plain_text_is_that_of_the_transformers_that_is_installed(tmp_path):
    from transformers import LlamaTokenizer

    shutil.copy(FILE, tmp_path / "tokenizer.model")
    theirs = LlamaTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.load(tmp_path, legacy=False)
    for text in ("So the answer is two.", "It is a dog, 12,34 (21,72)", "naïve café – 東京 😀", "line\nbreak"):
        assert ours.ids(text) == theirs.encode(text, add_special_tokens=False), text
