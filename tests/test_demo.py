"""The demo: which commands it runs, and what it says about their times."""

import json
import types

from crab_jax import evaluate, report
from crab_jax.tiny_world import demo
from data_pipelines.examples import Example


def test_the_demo_says_how_long_each_part_took(tmp_path, monkeypatch):
    ran = []
    model = types.SimpleNamespace(cfg=types.SimpleNamespace(image_size=64))
    monkeypatch.setattr(demo, "command", lambda verb, *words: ran.append((verb, [str(word) for word in words])))
    monkeypatch.setattr(demo, "save_untrained", lambda run, out: None)
    monkeypatch.setattr(demo, "collect_results", lambda out, scenes, size: None)
    monkeypatch.setattr(demo.run_params, "load_model", lambda run: (model,))

    demo.demo(tmp_path, from_scratch=False)

    evaluations = [evaluate.parse_arguments(words) for verb, words in ran if verb == "crab_jax.evaluate"]
    assert [(one.mute_audio, one.blank_video) for one in evaluations] == [
        (False, False),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert len({(one.data, one.batch_size, one.max_new_tokens, one.tasks, one.limit) for one in evaluations}) == 1
    assert report.parse_arguments(ran[-1][1]).results == str(tmp_path / "results.json")
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert list(seconds) == [
        "scenes",
        "train",
        "untrained model",
        "evaluate trained",
        "evaluate audio_muted",
        "evaluate video_blanked",
        "evaluate untrained",
        "baselines",
        "predict",
        "predict a mask",
        "report",
    ]


def test_the_report_has_the_scores_that_evaluate_wrote(tmp_path, monkeypatch):
    question = Example(id="q", task="avqa", instruction="?", meta={"answer": "two", "type": ["Audio", "Counting"]})
    monkeypatch.setattr(demo.run_data, "read_examples", lambda root, split: [question])
    for number, name in enumerate(("trained", "untrained", "audio_muted", "video_blanked")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"tasks": {"avqa": {"accuracy": number}}}))

    demo.collect_results(tmp_path, tmp_path, 64)

    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"] == {"avqa": {"accuracy": 0}}
    assert [found["baselines"][name]["avqa"]["accuracy"] for name in ("untrained", "audio_muted", "video_blanked")] == [
        1,
        2,
        3,
    ]
    assert {"empty", "constant"} <= found["baselines"].keys()
