"""How much of a bucket is empty, and that AV-UIE's lengths leave less than a tenth of the batches so."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from configs import finetune
from crab_jax.config import resolve
from data_pipelines import bucket_fill
from data_pipelines.batching import Bucket, Fill, collate, load
from data_pipelines.examples import Example
from data_pipelines.mixture import group_by_bucket, train_order
from data_pipelines.tokens import Tokenizer, chat_prompt, train_tiny_tokenizer

SHORT, LONG = Bucket(100, 1, 10, 98, 0), Bucket(200, 10, 10, 98, 1)
GROUPS = {
    SHORT: bucket_fill.Group(np.array([0, 1]), np.array([Fill(80, 1, 5), Fill(100, 1, 10)])),
    LONG: bucket_fill.Group(np.array([2]), np.array([Fill(150, 5, 5)])),
}


def test_padding_of_a_bucket_and_of_all():
    rows = bucket_fill.padding(GROUPS)
    assert [(row.bucket, row.examples) for row in rows] == [(SHORT, 2), (LONG, 1)]
    np.testing.assert_allclose([row[2:] for row in rows], [(2 / 3, 0.1, 0, 0.25), (1 / 3, 0.25, 0.5, 0.5)])
    # 70 of 400 positions, 5 of 12 frames and 10 of 30 windows.
    np.testing.assert_allclose(bucket_fill.total(rows), (70 / 400, 5 / 12, 1 / 3))
    last = bucket_fill.table(rows).splitlines()[-1].split()
    assert last == ["all", "3", "100.0%", "17.5%", "41.7%", "33.3%"]


def test_padding_counts_an_example_as_often_as_it_is_drawn():
    short, long = bucket_fill.padding(GROUPS, np.array([1.0, 0.0, 3.0]))  # example 1 is never drawn
    np.testing.assert_allclose(short[2:], (0.25, 0.2, 0, 0.5))
    assert (short.examples, long.share) == (1, 0.75)


def test_what_is_measured_is_what_a_batch_holds(root, tokenizer, config):
    clip = Example("clip", "ave", "See <video> and hear <audio>", target="a dog", video="clip.mp4")
    pictures = Example(
        "pictures",
        "ave",
        "See <video> and hear <audio>",
        target="a",
        audio="clip.wav",
        windows="five",
        frames=("0.png", "1.png"),
    )
    (row,) = bucket_fill.padding(group_by_bucket([clip, pictures], tokenizer, config))
    batch = collate([load(one, root, tokenizer, config) for one in (clip, pictures)], 2)
    empty = [1 - mask.mean() for mask in (batch.text_mask, batch.frame_mask, batch.audio_mask)]
    np.testing.assert_allclose(row[3:], empty)
    assert empty[1:] == [0.25, 0.25]


@pytest.fixture(scope="module")
def av_uie():
    """Synthetic AV-UIE at a hundredth of its size, of benchmarks/padding.py."""
    file = Path(__file__).parents[2] / "benchmarks" / "padding.py"
    spec = importlib.util.spec_from_file_location("padding_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.examples(0.01)


def test_av_uie_fills_nine_tenths_of_its_batches(av_uie, tmp_path):
    """The tokenizer here gives sequences about as long as LLaMA's, for which docs/datasets.md has the figures."""
    texts = [text for example in av_uie for text in (chat_prompt(example.instruction), example.target)]
    train_tiny_tokenizer(texts, tmp_path / "tokenizer.json", vocab_size=1200)
    config = resolve(finetune.get_config()).data
    assert (config.video_frames, config.visual_queries, config.audio_queries) == (10, 32, 32)
    rows = train_order(av_uie, Tokenizer.load(tmp_path / "tokenizer.json"), config, 1).padding
    assert sum(row.examples for row in rows) == len(av_uie) > 900
    assert max(bucket_fill.total(rows)) < 0.10, bucket_fill.table(rows)
