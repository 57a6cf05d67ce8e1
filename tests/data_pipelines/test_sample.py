"""`python -m data_pipelines sample`: which records are shown, and that the page says what a batch holds."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from crab_jax.io import packaged
from crab_jax.reports import record_page
from crab_jax.visualize.page import escape
from data_pipelines.batching import DataConfig, bucket_for, load
from data_pipelines.datasets import read
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(packaged.TOKENIZER)


def test_the_kinds_of_positions_are_those_of_the_batch(releases_root, tokenizer):
    config = DataConfig(lengths=(1024,), video_frames=4, visual_queries=3, audio_queries=2, image_size=32)
    example = read(releases_root, "avss", "train")[0]
    row, bucket = load(example, releases_root, tokenizer, config), bucket_for(example, tokenizer, config)
    kinds = np.array(record_page.kinds(row, bucket, config))
    assert (kinds == "visual").sum() == 4 * 3 and (kinds == "audio").sum() == 10 * 2
    np.testing.assert_array_equal(kinds == "target", row["loss_mask"])
    np.testing.assert_array_equal(kinds == "padding", ~row["text_mask"])
    runs = record_page.segments(kinds.tolist())
    assert [kind for kind, _, _ in runs] == ["text", "visual", "text", "audio", "text", "target", "padding"]
    assert [start for _, start, _ in runs] == [0, *np.cumsum([count for _, _, count in runs])[:-1]]


def test_the_choice_depends_on_the_seed_and_on_no_other_record(copied):
    root = copied("ave", "avsbench_semantic")

    def ids(seed, keep=2, names=("ave", "avss")):
        return [
            [e.id for e in group.examples] for group in record_page.groups(root, names, "train", "train", seed, keep)[0]
        ]

    assert ids(0) == ids(0) and {str(ids(seed)) for seed in range(4)} != {str(ids(0))}
    assert ids(3)[1:] == ids(3, names=("avss",)) and ids(3, 1)[0] == ids(3)[0][:1]
    (root / "ave/AVE/RUhOCu3LNXM.mp4").unlink()
    (group,), bad = record_page.groups(root, ["ave"], "train", "train", 0, 9)
    assert (group.task, group.dataset, group.records, bad) == ("ave", "ave", 4, {"ave": 1})


def test_the_page(releases_root, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        record_page.main(
            [
                "--root",
                str(releases_root),
                "--datasets",
                "ave,avss,arig,own",
                "--n",
                "1",
                "--out",
                str(tmp_path / "page"),
            ]
        )
    assert done.value.code == 0 and "4 records in" in capsys.readouterr().out
    page = (tmp_path / "page/index.html").read_text()
    shown = ["ave-ave", "avss-avss", "arig-arig", "avcap-own", "padding"]
    assert re.findall(r"<section id=\"([^\"]+)\"", page) == shown
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\(|<script", page)  # it needs nothing else
    sections = dict(re.findall(r"<section id=\"([^\"]+)\">(.*?)</section>", page, re.DOTALL))
    for name, pictures in {"ave-ave": 2, "avss-avss": 3, "arig-arig": 3, "avcap-own": 2}.items():
        found = re.findall(r"data:image/(png|jpeg);base64,([^\"]+)", sections[name])
        assert len(found) == pictures, name  # frames, filter banks, and the mask or the box
        for kind, data in found:
            assert Image.open(io.BytesIO(base64.b64decode(data))).format.lower() == kind
    strip = re.search(r"<svg.*?</svg>", sections["avss-avss"], re.DOTALL)[0]
    assert strip.count("predicts a mask token") == 6 and strip.count(">320</text>") == 2
    assert "10 frames of 32" in sections["avss-avss"] and "predict the mask tokens" in sections["avss-avss"]
    assert "Mask (semantic): " in sections["avss-avss"] and ">all<" in sections["padding"]
    example = record_page.groups(releases_root, ["ave"], "train", "train", 0, 1)[0][0].examples[0]
    assert example.id in sections["ave-ave"] and escape(example.target) in sections["ave-ave"]
    tokens = re.search(r"<div class=\"pieces\">(.*?)</div>", sections["ave-ave"], re.DOTALL)[1]
    assert re.sub(r"<[^>]+>|&crarr;", "", tokens).startswith("&lt;s&gt;[INST] &lt;&lt;SYS&gt;&gt;\nYou are a helpful")


def test_a_file_of_examples_and_what_cannot_be_shown(root, tokenizer, tmp_path):
    config = DataConfig()
    good = Example("<b>\u526a", "avcap", "See <image>", target="a dog", image="1.png", windows="none")
    bad = dataclasses.replace(good, id="bad", image="missing.png")
    long = dataclasses.replace(good, id="long", target="dog " * 900)
    weak = dataclasses.replace(good, id="weak", target="")
    shown = {
        one.id: record_page.article(
            one, root, tokenizer, dataclasses.replace(config, lengths=(256, *record_page.LONGER))
        )
        for one in (good, bad, long, weak)
    }
    assert "&lt;b&gt;\u526a" in shown[good.id] and "<b>\u526a" not in shown[good.id]
    assert "missing.png" in shown["bad"] and 'class="bad"' in shown["bad"] and "<svg" not in shown["bad"]
    assert "longer than 256" in shown["long"] and "longer than" not in shown[good.id]
    assert "training leaves this record out" in shown["weak"] and "<svg" in shown["weak"]
    write_jsonl(tmp_path / "test.jsonl", [good, bad])
    (group,), none = record_page.groups(tmp_path, [], "test", "train", 0, 5)
    assert (group.records, none) == (2, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--root", "/no/such/folder", "--out", "{tmp}/x"], "--root.*is no folder"),
        (["--root", "."], "--out"),
        (["--root", ".", "--out", "{tmp}", "--n", "0"], "--n.*must be a whole number from 1"),
        (["--root", ".", "--out", "{tmp}", "--datasets", "avee"], "avee.*unknown dataset"),
        (["--root", "{tmp}", "--out", "{tmp}/x"], "no readable record of 'train'"),
        (["--root", ".", "--out", "{tmp}", "--tokenizer", "no.json"], "no.json.*no such file"),
    ],
)
def test_bad_command_lines_end_in_one_line(argv, message, tmp_path, one_line_error):
    one_line_error(record_page.main, [argument.format(tmp=tmp_path) for argument in argv], message)
