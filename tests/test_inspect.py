"""Looking into the router: weights per segment add up, and taking a head out is what it says."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import tiny
from crab_jax import inspect as verb
from crab_jax import router
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.reports import router_page
from crab_jax.runs import run_params
from crab_jax.tasks import TASKS
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example, write_jsonl

NAMES = list(TASKS)
WITHOUT_2, ONLY_3 = np.array([1, 0, 1], np.float32), np.array([0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def small():
    """(model, parameters): one layer per module where it may be, random weights."""
    config = tiny.get_config()
    config.update(
        {"sizes": {"llama": {"layers": 2}, "beats": {"layers": 1}, "visual": {"layers": 1}, "audio": {"layers": 1}}}
    )
    model, rng = resolve(config).model.build(), np.random.default_rng(0)
    shapes = nn.unbox(run_params.abstract_params(model))
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def batch(small):
    """ave with 9 positions (2 visual, 3 audio, 3 prompt, 1 answer), s4 with 12 of text, and a filler row.

    All tests use this one shape, so that each function is compiled once.
    """
    model, rng = small[0], np.random.default_rng(1)
    batch = empty_batch(Bucket(length=12, frames=1, windows=2, fbank_frames=98, masks=1), 3, 64)
    slots, visual = np.full((3, 12), -1, np.int32), model.cfg.visual.queries
    slots[0, 1:6] = [0, 1, visual, visual + 1, visual + 2]
    loss_mask = np.zeros((3, 12), bool)
    loss_mask[0, 8], loss_mask[1, 9:] = True, True
    return batch.replace(
        tokens=rng.integers(4, 600, batch.tokens.shape).astype(np.int32),
        slots=slots,
        loss_mask=loss_mask,
        text_mask=np.arange(12) < np.array([[9], [12], [12]]),
        index=np.array([0, 1, -1], np.int32),
        seg_kind=np.array([[0], [1], [1]], np.int32),
        task=np.array([NAMES.index("ave"), NAMES.index("s4"), 0], np.int32),
    )


def test_router_weights_are_means_over_the_real_tokens_of_each_task_and_segment(small, batch):
    model, params = small
    heads = model.cfg.lora.heads
    found = router.router_weights(model, params, [batch])
    assert list(found) == ["ave", "s4"]
    assert found["ave"].tokens.tolist() == [2, 3, 3, 1] and found["s4"].tokens.tolist() == [0, 0, 9, 3]
    for routing in found.values():
        assert routing.weights.shape == (4, 2, 7, heads) and routing.entropy.shape == (4, 2, 7)
        there = routing.tokens > 0
        np.testing.assert_allclose(routing.weights[there].sum(-1), 1, rtol=1e-5)
        assert not routing.weights[~there].any()
        assert (routing.entropy[there] > 0).all() and (routing.entropy <= np.log2(heads) + 1e-5).all()
        weights, entropy = routing.overall()
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(entropy, np.average(routing.entropy, axis=0, weights=routing.tokens), rtol=1e-6)

    padded = batch.replace(tokens=np.where(np.asarray(batch.text_mask), batch.tokens, 7))
    again = router.router_weights(model, params, [padded, padded])
    np.testing.assert_allclose(again["ave"].weights, found["ave"].weights, atol=1e-5)
    assert again["ave"].tokens.tolist() == [4, 6, 6, 2]
    assert np.abs(found["ave"].weights[2] - found["s4"].weights[2]).max() > 1e-3


def test_a_head_that_is_taken_out_adds_nothing(small):
    _, params = small
    old, cut, none = (
        traverse_util.flatten_dict(tree)
        for tree in (params, router.keep_heads(params, WITHOUT_2), router.keep_heads(params, np.zeros(3)))
    )
    heads = [path for path in old if path[-1] == "lora_B"]
    assert heads and {path for path in old if not np.array_equal(old[path], cut[path])} == set(heads)
    for path in heads:
        assert not np.asarray(cut[path])[..., 1, :, :].any() and not np.asarray(none[path]).any()
        np.testing.assert_array_equal(np.asarray(cut[path])[..., 0, :, :], old[path][..., 0, :, :])


def test_ablation_tells_what_each_head_does_to_text_and_masks(small, batch):
    model, params = small
    # Head 2 is empty already: without it nothing changes, and without head 1 all that is left is head 3.
    params = router.keep_heads(params, WITHOUT_2)
    effects = router.ablation(model, params, [batch, batch])
    assert list(effects) == ["ave", "s4"] and list(effects["s4"])[0] == router.INTACT
    assert set(effects["ave"][router.INTACT]) == {"text"} and set(effects["s4"][router.INTACT]) == {
        "text",
        "bce",
        "dice",
    }
    increase, rest = (
        router_page.increases(effects, "text"),
        router.ablation(model, router.keep_heads(params, ONLY_3), [batch]),
    )
    for task in effects:
        assert increase[task]["without head 2"] == pytest.approx(0, abs=1e-6)
        assert abs(increase[task]["without head 1"]) > 1e-4
        assert rest[task]["without head 3"]["text"] == pytest.approx(
            effects[task][router.WITHOUT_ALL]["text"], rel=1e-5
        )
    assert list(router_page.increases(effects, "bce")) == ["s4"]


def test_the_verb_writes_json_and_plots(small, batch, tmp_path, monkeypatch, capsys):
    model, params = small
    write_jsonl(tmp_path / "test.jsonl", [Example(id="a", task="ave", instruction="?", target="!")])
    monkeypatch.setattr(run_params, "load_model", lambda path: (model, params, None, None))
    monkeypatch.setattr(verb, "answered_batches", lambda examples, *rest: [batch])
    verb.router(
        verb.parse_arguments(["router", "--checkpoint", "x", "--out", str(tmp_path / "o"), "--data", str(tmp_path)])
    )
    found = json.loads((tmp_path / "o" / "router.json").read_text())
    heads = model.cfg.lora.heads
    assert found["heads"] == heads and len(found["projections"]) == 7
    assert set(found["routing"]["ave"]) == {"all", *router.SEGMENTS} and set(found["routing"]["s4"]) == {
        "all",
        "text",
        "answer",
    }
    assert np.shape(found["routing"]["ave"]["visual"]["weights"]) == (2, 7, heads)
    assert found["ablation"]["s4"][router.WITHOUT_ALL].keys() == {"text", "bce", "dice"}
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert {
        "router.html",
        "router_layers.png",
        "router_projections.png",
        "router_segments.png",
        "router_entropy.png",
        "ablation_text.png",
        "ablation_bce.png",
    } <= names
    assert "without head 1" in capsys.readouterr().out


def test_bad_input_is_named(small, tmp_path, monkeypatch):
    model, params = small
    monkeypatch.setattr(run_params, "load_model", lambda path: (model, params, None, None))
    write_jsonl(tmp_path / "test.jsonl", [Example(id="a", task="ave", instruction="?")])
    arguments = ["router", "--checkpoint", "x", "--out", str(tmp_path / "o"), "--data", str(tmp_path)]
    with pytest.raises(InputError, match="'a'.*target"):
        verb.router(verb.parse_arguments(arguments))
    with pytest.raises(InputError, match="--samples"):
        verb.parse_arguments([*arguments, "--samples", "0"])
    with pytest.raises(InputError, match="invalid choice"):
        verb.parse_arguments(["heads", "--checkpoint", "x", "--out", "y"])
