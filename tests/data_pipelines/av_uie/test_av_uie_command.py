"""The commands from original releases to a data set with its card, and the card itself."""

import dataclasses
import json
import zipfile

import pytest
from labelled import ALL

from data_pipelines.av_uie import __main__ as commands
from data_pipelines.av_uie import card, labels, templates, verify
from data_pipelines.examples import read_jsonl, write_jsonl
from data_pipelines.tokens import train_tiny_tokenizer


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as end:
        commands.main([*map(str, arguments)])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


@pytest.fixture
def releases(tmp_path):
    """The annotations of AVE, LLP and MUSIC-AVQA in their layouts; of the videos only that they exist."""
    root = tmp_path / "raw"
    videos = [
        "ave/AVE/RUhOCu3LNXM.mp4",
        "ave/AVE/MH3m4AwEcRY.mp4",
        "llp/data/LLP_dataset/video/BjCEufrlXm4.mp4",
        "music_avqa/videos/00000093.mp4",
    ]
    for path in videos:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    (root / "ave/trainSet.txt").write_text("Church bell&RUhOCu3LNXM&good&0&10\nChurch bell&MH3m4AwEcRY&good&6&8\n")
    (root / "llp/data/AVVP_train.csv").write_text("filename\tevent_labels\nBjCEufrlXm4_20_30\tSpeech,Dog\n")
    (root / "music_avqa/data/json_update").mkdir(parents=True)
    (root / "music_avqa/data/json_update/avqa-train.json").write_text(
        json.dumps(
            [
                {
                    "video_id": "00000093",
                    "question_id": 12,
                    "type": '["Audio", "Counting"]',
                    "templ_values": "[]",
                    "question_content": "How many musical instruments were heard throughout the video?",
                    "question_deleted": 0,
                    "anser": "one",
                }
            ]
        )
    )
    return root


def test_from_releases_to_a_card(releases, capsys):
    out = releases / "train.jsonl"
    code, said, _ = run(capsys, "write", "--root", releases, "--out", out)
    assert code == 0 and said == "3 targets written, 1 left out (labels without times or names)\n"
    assert [labels.reasoning_of(one) != "" for one in read_jsonl(out)] == [True] * 3
    code, said, _ = run(capsys, "verify", "--examples", out, "--out", releases / "checked")
    assert code == 0 and said.startswith("3 good, 0 in quarantine")
    assert read_jsonl(releases / "checked/good.jsonl") == read_jsonl(out)
    code, said, _ = run(capsys, "card", "--examples", releases / "checked/good.jsonl", "--out", releases / "card")
    found = json.loads((releases / "card/card.json").read_text())
    assert code == 0 and said == (releases / "card/card.md").read_text()
    assert found["sources"] == {"ave": {"samples": 2, "share": 0.6667}, "avqa": {"samples": 1, "share": 0.3333}}


def test_released_labels_reach_the_rows_of_the_releases(releases, tmp_path, capsys):
    texts = {
        "ave": (
            "RUhOCu3LNXM",
            "A bell. So the audible and visible event in the video is <event> Church bell "
            "</event>, and the time range is <range> 0,10 </range>.",
        ),
        "avvp": ("BjCEufrlXm4", "<visual>Dog,(0 10)</visual> and <audio>Speech,(0 4)</audio>"),
        "music_avqa": ("12", "I count. So the answer is <answer> two </answer>."),
    }
    arguments = []
    for name, (stem, text) in texts.items():
        with zipfile.ZipFile(tmp_path / f"{name}_converted_label.zip", "w") as archive:
            archive.writestr(f"converted_label/{stem}.txt", text)
        arguments += ["--labels", tmp_path / f"{name}_converted_label.zip"]
    out = releases / "released.jsonl"
    code, said, _ = run(capsys, "read", "--root", releases, *arguments, "--out", out)
    assert code == 0 and "ave: 1 targets from 1 labels; 1 examples have none" in said
    assert [one.id for one in read_jsonl(out)] == ["ave-RUhOCu3LNXM-0", "avvp-BjCEufrlXm4_20_30", "avqa-12"]
    report = json.loads((releases / "released.jsonl.report.json").read_text())
    assert report["ave"]["examples_without"] == ["ave-MH3m4AwEcRY-0"] and report["avvp"]["labels_unused"] == []

    run(capsys, "verify", "--examples", out, "--out", releases / "checked")
    verdict = json.loads((releases / "checked/verify.json").read_text())
    assert verdict["good"] == 2 and verdict["quarantined"] == [
        {"id": "avqa-12", "task": "avqa", "reasons": ["the answer is 'two', the label says 'one'"]}
    ]
    assert "avqa-12" in (releases / "checked/review.html").read_text()
    (tmp_path / "ids").write_text("avqa-12\n")
    _, said, _ = run(capsys, "verify", "--examples", out, "--out", releases / "checked", "--accept", tmp_path / "ids")
    assert said.startswith("3 good, 0 in quarantine")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["write", "--out", "x"], "give plain labels once"),
        (
            ["write", "--root", "ROOT", "--datasets", "ave", "--examples", "e.jsonl", "--out", "x"],
            "give plain labels once",
        ),
        (["write", "--root", "ROOT", "--tasks", "avs", "--out", "x"], "unknown task 'avs'"),
        (["write", "--root", "ROOT", "--tasks", "arig", "--out", "x"], "no example of arig"),
        (["write", "--root", "ROOT"], "--out"),
        (["annotate", "--root", "ROOT", "--out", "x"], "--url"),
        (
            ["annotate", "--root", "ROOT", "--url", "http://h/v1", "--model", "m", "--parameters", "[]"],
            "no JSON object",
        ),
        (["annotate", "--root", "ROOT", "--url", "http://h/v1", "--model", "m"], "--out is missing"),
        (["annotate", "--root", "ROOT", "--workers", "0"], "must be a whole number from 1"),
        (["verify", "--examples", "none.jsonl", "--out", "x"], "no such file"),
        ([], "required"),
    ],
)
def test_bad_commands_end_in_one_line(releases, tmp_path, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)  # some make their --out before they look at what they are given
    code, _, said = run(capsys, *[str(releases) if word == "ROOT" else word for word in arguments])
    assert code == 2 and problem in said and said.count("\n") <= 1 + said.count("reading ")


def test_a_label_file_of_other_clips_is_an_error(releases, tmp_path, capsys):
    path = tmp_path / "ave_converted_label.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("converted_label/___________.txt", "x")
    code, _, said = run(capsys, "read", "--root", releases, "--labels", path, "--out", tmp_path / "x")
    assert code == 2 and "none of its 1 labels (such as '___________') belongs to an example" in said
    assert not (tmp_path / "x").exists()


def test_decisions_about_unknown_ids_are_errors(tmp_path, capsys):
    write_jsonl(tmp_path / "all.jsonl", [templates.write(one, tmp_path) for one in ALL])
    (tmp_path / "ids").write_text("nobody\n")
    code, _, said = run(
        capsys, "verify", "--examples", tmp_path / "all.jsonl", "--out", tmp_path / "out", "--reject", tmp_path / "ids"
    )
    assert code == 2 and "'nobody' is the id of no example" in said


@pytest.mark.parametrize("command", ["read", "write", "annotate", "verify", "card"])
def test_every_command_has_help_with_an_example(capsys, command):
    code, said, _ = run(capsys, command, "--help")
    assert code == 0 and f"python -m data_pipelines.av_uie {command} --" in said


def test_the_card_counts_samples_shares_lengths_and_reasoning():
    written = [templates.write(one, "/nowhere") for one in ALL]
    plain = dataclasses.replace(ALL[0], id="plain", target=labels.answer(ALL[0]))
    found = card.card([*written, plain])
    assert found["samples"] == 10 and found["tasks"]["ave"]["samples"] == 2
    assert found["coverage"] == 0.8  # all but the caption and the plain one
    assert found["tasks"]["ave"]["coverage"] == 0.5 and found["tasks"]["ave"]["writers"] == {"template": 1, "plain": 1}
    assert found["tasks"]["ave"]["distinct_reasoning"] == 1
    assert sum(row["samples"] for row in found["granularity"].values()) == 10
    assert found["granularity"]["pixel-level understanding"] == {"samples": 4, "share": 0.4}
    words = [len(one.target.split()) for one in (written[0], plain)]
    assert found["tasks"]["ave"]["target_words"]["mean"] == sum(words) / 2
    assert found["tasks"]["ave"]["target_words"]["max"] == max(words)
    assert set(found["tasks"]) == set(card.GRANULARITY)
    page = card.markdown(found, "Mine")
    assert page.startswith("# Mine\n") and "| avcap | 1 | 10.0% |" in page and "tokens" not in page


def test_the_card_counts_tokens_of_a_tokenizer(tmp_path, capsys):
    written = [templates.write(one, tmp_path) for one in ALL]
    train_tiny_tokenizer([one.target for one in written] * 5, tmp_path / "tokenizer.json", vocab_size=300)
    write_jsonl(tmp_path / "all.jsonl", written)
    code, said, _ = run(
        capsys,
        "card",
        "--examples",
        tmp_path / "all.jsonl",
        "--tokenizer",
        tmp_path / "tokenizer.json",
        "--out",
        tmp_path / "card",
    )
    tokens = json.loads((tmp_path / "card/card.json").read_text())["tasks"]["ave"]["target_tokens"]
    assert code == 0 and tokens["max"] >= len(written[0].target.split()) and "tokens mean" in said


def test_written_targets_survive_the_file(tmp_path):
    written = [templates.write(one, tmp_path) for one in ALL]
    write_jsonl(tmp_path / "all.jsonl", written)
    assert read_jsonl(tmp_path / "all.jsonl") == written
    assert verify.split(read_jsonl(tmp_path / "all.jsonl"), tmp_path)[1] == []
