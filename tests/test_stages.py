"""The paper's five stages at tiny size: each starts from the one before and improves what it trains."""

from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from crab_jax import defaults, optim
from crab_jax.checkpoints.stored import load_params
from crab_jax.runs import run_folder
from crab_jax.tasks import TASKS
from crab_jax.tiny_world import stages


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "base"
    stages.save_base(Path("warm_start"), out)
    return out


def test_the_first_stage_starts_from_encoders_and_language_model_alone(base):
    kept = traverse_util.flatten_dict(load_params(base), sep="/")
    assert {path.split("/")[0] for path in kept} == {"clip", "beats", "llama"}
    assert not any("lora_" in path for path in kept)


def test_every_stage_of_the_paper_is_run_with_its_own_config():
    assert [stage.name for stage in stages.STAGES] == [
        "pretrain_visual",
        "pretrain_audio",
        "pretrain_seg",
        "finetune",
        "finetune_avs",
    ]
    assert all(set(stage.tasks) <= set(TASKS) for stage in stages.STAGES)


@pytest.mark.exhaustive
def test_every_stage_improves_what_it_trains_and_changes_nothing_else(tmp_path):
    seen = stages.stages(tmp_path, Path("warm_start"), scale=0.1)
    assert all(last < first for first, last in seen.values()), seen
    before = tmp_path / "pretrain_visual"
    for stage in stages.STAGES[1:]:
        run = tmp_path / stage.name
        config = run_folder.load_config(run)
        assert config.init_from == str(before)
        trained, frozen = (
            [traverse_util.flatten_dict(part, sep="/") for part in pair]
            for pair in zip(
                *(optim.split(load_params(path), config.trainable, config.frozen) for path in (before, run)),
                strict=True,
            )
        )
        assert all(np.array_equal(frozen[0][path], frozen[1][path]) for path in frozen[0])
        assert any(not np.array_equal(trained[0][path], trained[1][path]) for path in trained[0])
        before = run
    assert set(defaults.ENCODERS) <= set(config.frozen)
