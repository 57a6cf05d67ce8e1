"""The report: one self-contained file with every section, and what it says about the router."""

import re

import numpy as np
import pytest
from PIL import Image

from crab_jax import report as verb
from crab_jax.inference import read_answer
from crab_jax.reports import answer_pictures, run_page
from crab_jax.router import Routing
from crab_jax.tasks import TASKS
from crab_jax.visualize import overlay
from crab_jax.visualize.page import Picture
from data_pipelines.examples import Example


def scores(value):
    """Scores of every task with an interval of the headline metric."""
    return {
        name: {
            task.headline: value,
            "n": 7,
            "n_unparsed": 1,
            "n_no_mask": 2,
            "intervals": {task.headline: [value - 0.1, value + 0.1]},
        }
        for name, task in TASKS.items()
    }


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    parts = ("loss", "loss/text", "loss/bce", *(f"loss/{name}" for name in TASKS))
    weights = rng.dirichlet((1, 2, 3), (4, 2, 7))
    routing = Routing(weights, np.ones((4, 2, 7)), np.array([5, 5, 2, 0]))
    picture = Picture(overlay.png(np.zeros((4, 4, 3), np.uint8)), "look <here>")
    return run_page.ReportData(
        title="Report of a & b",
        config={"seed": 3, "optim.lr": 1e-4},
        metrics=[{"step": step, **dict.fromkeys(parts, 1 / step)} for step in (10, 20, 30)],
        results={"tasks": scores(0.75), "baselines": {"constant": scores(0.25), "empty": {}}},
        pictures={"masks": [picture], "boxes": [picture], "times": []},
        answers=[("avqa", "How many?", "two", "<answer> three </answer>")],
        routing={"ave": routing, "s4": routing},
    )


@pytest.fixture(scope="module")
def page(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    run_page.write(path, data)
    return path.read_text()


def section(page, key):
    return re.search(rf'<section id="{key}">(.*?)</section>', page, re.DOTALL)[1]


def test_the_file_needs_nothing_but_itself(page):
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", text)
    assert set(re.findall(r'src="([^"]*)"', text)) == {"data:image/png;"}
    assert 'name="viewport"' in text and "@media print" in text


def test_every_section_is_there_and_an_empty_one_says_so(page):
    for key, title in run_page.SECTIONS.items():
        assert f"<h2>{title}</h2>" in section(page, key) and f'href="#{key}"' in page
    assert "Not part of this report" in section(page, "times")
    assert "Not part of this report" not in section(page, "masks")


def test_every_figure_has_a_caption_and_text_is_escaped(page):
    assert page.count("<figure>") == page.count("<figcaption>") == 2 + 1 + 1 + 1 + 4
    assert "<title>Report of a &amp; b</title>" in page
    assert "&lt;answer&gt; three &lt;/answer&gt;" in section(page, "answers") and "look &lt;here&gt;" in page


def test_scores_stand_beside_baselines_with_intervals_and_counts(page):
    table = section(page, "scores").split("</table>")[0]
    row = re.search(r"<tr><td>ave</td>.*?</tr>", table)[0]
    assert [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", row)] == [
        "ave",
        "accuracy",
        "7",
        "0.750 [0.650, 0.850]",
        "0.250 [0.150, 0.350]",
        "-",
    ]


def test_an_empty_report_can_be_written(tmp_path):
    run_page.write(tmp_path / "r.html", run_page.ReportData("nothing yet"))
    assert (tmp_path / "r.html").read_text().count("Not part of this report") == len(run_page.SECTIONS) - 1


def test_examples_are_spread_over_the_split():
    examples = [Example(id=f"{task}{i}", task=task, instruction="?") for i in range(10) for task in ("s4", "ave")]
    assert [e.id for e in verb.spread(examples, 3)] == ["ave0", "ave3", "ave6", "s40", "s43", "s46"]


def test_answers_are_shown_next_to_the_truth(tmp_path):
    Image.new("RGB", (20, 10), (90, 90, 90)).save(tmp_path / "p.png")
    Image.fromarray(np.eye(10, 20, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    s4 = Example("s", "s4", "?", image="p.png", mask="m.png", mask_kind="binary", meta={"objects": ["dog"]})
    arig = Example("a", "arig", "?", image="p.png", meta={"object": "dog", "box": [0, 0, 99, 99]})
    avqa = Example("q", "avqa", "?", meta={"answer": "two", "question": "How many?"})
    found = answer_pictures.collect(
        [
            read_answer(s4, "", np.ones((4, 4), np.float32)),
            read_answer(arig, "no box", None),
            read_answer(avqa, "one", None),
        ],
        tmp_path,
    )
    assert {key: len(value) for key, value in found["pictures"].items()} == {"masks": 1, "boxes": 1, "times": 0}
    assert "no box could be read" in found["pictures"]["boxes"][0].caption
    assert found["answers"] == [("avqa", "How many?", "two", "one")]
