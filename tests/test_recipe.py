"""The tiny recipe in a shortened form: every stage runs from the one before and improves what it trains."""

import json

import pytest

from crab_jax.runs import run_params
from crab_jax.tiny_world import recipe


@pytest.mark.exhaustive
def test_every_stage_of_the_recipe_improves_what_it_trains(tmp_path, capfd):
    recipe.recipe(tmp_path, tmp_path / "packed", scale=0.04)

    out = capfd.readouterr().out
    for part in ("llama", "clip", "beats", "visual q-former", "audio q-former"):
        losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if line.startswith(f"{part} ")]
        assert losses[-1] < 0.8 * losses[0], part
    for stage in ("pretrain", "joint"):
        lines = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["loss/text"] < lines[0]["loss/text"]
        assert lines[-1]["loss/dice"] < lines[0]["loss/dice"]
    model, _, config, _ = run_params.load_model(tmp_path / "packed")
    assert config.init_from == str(tmp_path / "pretrain") and model.cfg.lora.heads == 3
    results = json.loads((tmp_path / "packed" / "results.json").read_text())["tasks"]
    assert set(results) == {"avqa", "ave", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap"}
    assert json.loads((tmp_path / "packed" / "recipe.json").read_text())["scale"] == 0.04
