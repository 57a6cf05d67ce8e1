"""The warm-up of the tiny model: what it reads of a scene, and what it says that masks point at."""

import jax
import numpy as np
import pytest

from configs import tiny
from crab_jax.config import resolve
from crab_jax.runs import run_data, run_folder
from crab_jax.tiny_world import pretrain
from data_pipelines.sources import scene_graph


@pytest.fixture(scope="module")
def world(scenes_root):
    """(examples, scenes by folder, number of each scene, stacked tables) of the train split."""
    examples = run_data.read_examples(scenes_root, "train")
    folders = sorted({example.meta["scene"] for example in examples})
    scenes = {folder: scene_graph.load(scenes_root / folder / "scene.json") for folder in folders}
    tables = [pretrain.table_of(scene) for scene in scenes.values()]
    return (
        examples,
        scenes,
        {folder: number for number, folder in enumerate(folders)},
        {name: np.stack([table[name] for table in tables]) for name in tables[0]},
    )


def test_pointed_map_holds_the_area_of_the_boxes_of_the_named_things(world):
    examples, scenes, _, _ = world
    masked = [e for e in examples if e.mask_kind != "none"]
    assert {e.task for e in masked} == {"s4", "ms3", "avss", "ref-avs"}
    cell = (scene_graph.BOX_SPACE / pretrain.GRID) ** 2
    for example in masked:
        scene = scenes[example.meta["scene"]]
        names = example.meta["objects"] if example.task != "ref-avs" else [example.meta["object"]]
        told = pretrain.mask_summary(pretrain.table_of(scene), example)
        kinds, share = np.split(told, [pretrain.KINDS])
        assert {k for k, told in zip(scene_graph.KINDS, kinds, strict=True) if told} == set(names) & set(
            scene_graph.KINDS
        )
        boxes = [t.boxes[example.second] for t in scene.things if t.kind in names and t.seen(example.second)]
        area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in filter(None, boxes))
        assert share.max(initial=0) <= 1
        if len(boxes) < 2:  # overlapping boxes share cells
            np.testing.assert_allclose(share.sum() * cell, area, rtol=1e-4)


def test_a_batch_shows_the_second_that_its_picture_and_window_show(world):
    examples, _, numbers, tables = world
    config = resolve(tiny.get_config())
    tokenizer, decode = run_folder.tokenizer_of(config), config.data
    boxes = [e for e in examples if e.task == "arig"]
    groups = pretrain.text_arrays(boxes, numbers, tables, tokenizer, decode)
    assert len(groups) == 1 and len(groups[0]["tokens"]) == len(boxes)
    batch = next(pretrain.reader_batches(groups, tables, 64, np.random.default_rng(0)))
    by_tokens = {tuple(row): number for number, row in enumerate(groups[0]["tokens"])}
    for row in range(64):
        example = boxes[by_tokens[tuple(batch["tokens"][row])]]
        scene = numbers[example.meta["scene"]]
        for name in ("what", "where", "loudness"):
            np.testing.assert_array_equal(batch[name][row], tables[name][scene, [example.second]])
    video = [e for e in examples if e.task == "ave"]
    batch = next(
        pretrain.reader_batches(
            pretrain.text_arrays(video, numbers, tables, tokenizer, decode), tables, 4, np.random.default_rng(0)
        )
    )
    assert batch["what"].shape == (4, scene_graph.SECONDS, pretrain.SLOTS, pretrain.KINDS)


def test_mask_states_are_where_the_mask_tokens_are_predicted(world):
    examples, _, numbers, tables = world
    config = resolve(tiny.get_config())
    tokenizer = run_folder.tokenizer_of(config)
    for group in pretrain.text_arrays(examples, numbers, tables, tokenizer, config.data):
        for tokens, states, pointed in zip(group["tokens"], group["states"], group["pointed"], strict=True):
            if states.max() < 0:
                assert not pointed.any()
            else:
                assert tokens[states + 1].tolist() == list(tokenizer.mask_ids)


def test_the_language_model_goes_on_from_the_one_that_is_given(world):
    """Two steps of 2e-3 at most move a weight by less than 0.01."""
    examples, _, numbers, tables = world
    config = resolve(tiny.get_config())
    captions = [e for e in examples if e.task == "avcap"]
    groups = pretrain.text_arrays(captions, numbers, tables, run_folder.tokenizer_of(config), config.data)

    def learn(start=None):
        learned = pretrain.warm_llama(config.model, groups, tables, 2, np.random.default_rng(0), start)
        return jax.tree.map(np.asarray, learned["llama"])

    start = jax.tree.map(lambda x: x + 1, learn())
    jax.tree.map(lambda ours, given: np.testing.assert_allclose(ours, given, atol=0.01), learn(start), start)
