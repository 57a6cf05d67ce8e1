"""Every page that is written, with hostile text in every field that a user or a data set controls: it holds the same
elements and attributes as with harmless text, and nothing in it is fetched or run."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from crab_jax.inference import Prediction
from crab_jax.io import packaged
from crab_jax.io.errors import InputError, cell, printable
from crab_jax.io.errors import report as say
from crab_jax.io.progress import on_stderr
from crab_jax.reports import clip_page, evaluation_page, record_page, review_page, run_page
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import IMAGE
from crab_jax.visualize import charts, overlay, page
from crab_jax.visualize.page import Html
from data_pipelines.av_uie import card
from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example
from data_pipelines.tokens import Tokenizer

HARMLESS = "a <range> of plain words"
SCRIPTS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<a href=//e.x>x</a>",
    "<iframe src=https://e.x>",
    "<meta http-equiv=refresh content=0;url=//e.x>",
    "<base href=//e.x>",
    "<link rel=stylesheet href=//e.x>",
    "<style>*{display:none}</style>",
    "<form action=//e.x><input name=q>",
    "<object data=//e.x>",
    "<video src=x onerror=alert(1)>",
    "<math><a xlink:href=javascript:alert(1)>",
    "<body onload=alert(1)>",
    "javascript:alert(1)",
    "<details open ontoggle=alert(1)>",
    "{0.__class__} {} {x}",
    "<input autofocus onfocus=alert(1)>",
    "<textarea>",
    "<plaintext>",
)
AROUND = ("{}", '">{}', "'>{}", "</pre></title></style></script></textarea>{}", "-->{}<!--", "]]>{}<![CDATA[")
ODD = [
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "` onerror=`x",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "&#x3c;b&#x3e;",
    "&quot; onclick=&quot;x",
    "\0<script>\0",
    "<scr\0ipt>x</scr\0ipt>",
    "\u202e<gpj.exe>\u202c",
    "\u2066x\u2069",
    "\ufeff<b>",
    "\x1b[31mred\x1b]0;title\x07",
    "a\r\nb\x85c\u2028d",
    "\ud800 half",
    "\uff1cscript\uff1e",
    "+ADw-script+AD4-",
    "<\u017fcript>",
    "=cmd|' /C calc'!A1",
    "%3Cscript%3E",
    "$\\frac{$",
    "x" * 5000,
]
HOSTILE = [around.format("{}").replace("{}", text, 1) for text in SCRIPTS for around in AROUND] + ODD


class Found(HTMLParser):
    """(tag, attribute, its value where it is not text for people) of all that a page holds."""

    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.texts, self.inside = set(), [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.found.add((tag, "", ""))
        for name, value in attrs:
            value = re.sub(r"^(data:\w+/\w+;base64,)[A-Za-z0-9+/=]*$", r"\1", value or "")
            value = re.sub(r"^[\d. ]+$", "number", value)  # places in a drawing
            value = re.sub(r"^#?[\w-]*$", "word", value) if name in ("id", "href") else value
            self.found.add((tag, name, "" if name in ("alt", "title", "value") else value))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.scripts if self.inside in ("script", "style") else self.texts).append(data)

    def handle_comment(self, data):
        self.found.add(("a comment", "", ""))

    def handle_pi(self, data):
        self.found.add(("an instruction", "", ""))

    def unknown_decl(self, data):
        self.found.add(("a declaration", "", ""))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(packaged.TOKENIZER)


@pytest.fixture(autouse=True)
def quick_charts(monkeypatch):
    """Charts are pictures: what they say cannot become HTML."""
    for name in ("score_bars", "loss_curves", "breakdown_bars"):
        monkeypatch.setattr(charts, name, lambda *_: b"png")


def asked(text, **more):
    return Example(
        **{
            "id": text,
            "task": "avqa",
            "instruction": f"{text}\n{text}",
            "target": text,
            "windows": "none",
            "meta": {"dataset": text, "question": text, "answer": text, "row": text, text: [text]},
            **more,
        }
    )


def file_name(text):
    return (text.translate({0: None, ord("/"): None}).encode("utf-8", "replace").decode() or "x")[:60]


def plain(text, tmp_path, tokenizer):
    page.write(
        tmp_path / "page.html",
        text,
        page.figure(page.Picture(b"png", text)),
        [page.Section(text, text, page.table((text,), [(text,)])), page.Section(text, text, page.NONE)],
    )
    return (tmp_path / "page.html").read_text()


def results(text, tmp_path, tokenizer):
    row = {"n": text, "n_unparsed": text, "n_no_mask": 0, "accuracy": 0.5, TASKS["avqa"].headline: 0.5}
    answer = Prediction(asked(text), text, None, None, (text,))
    shown = [
        (text, evaluation_page.drawn(one, 0.5, tmp_path))
        for one in (
            answer,
            Prediction(
                asked(text, task="s4", image=file_name(text), mask="rle:" + text, mask_kind="binary"), text, None
            ),
        )
    ]
    evaluation_page.write(
        tmp_path / "page.html",
        text,
        {"tasks": {"avqa": {**row, "n": 3, "n_unparsed": 0}}},
        {"avqa": {text: (0.5, 3)}},
        shown,
    )
    run = run_page.ReportData(
        title=text,
        config={"seed": text, text: text},
        results={"tasks": {"avqa": row}, "baselines": {text: {}}},
        metrics=[{"step": 1}],
        pictures={"masks": [page.Picture(b"png", text)]},
        answers=[(text,) * 4],
    )
    run_page.write(tmp_path / "report.html", run)
    return (tmp_path / "page.html").read_text() + (tmp_path / "report.html").read_text()


def clip(text, tmp_path, tokenizer):
    (tmp_path / file_name(text)).write_bytes(b"no media")
    kinds = (("avqa", text, None), ("avcap", text, None), ("s4", {"objects": [text]}, None), ("ms3", None, b"png"))
    answers = [
        clip_page.Answered(Prediction(asked(text, task=task), text, parsed, None, (text,)), picture, (text,))
        for task, parsed, picture in kinds
    ]
    clip_page.write(tmp_path / "page.html", [str(tmp_path / file_name(text))], answers, b"png")
    return (tmp_path / "page.html").read_text()


def data_sample(text, tmp_path, tokenizer):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config = DataConfig(image_size=28)
    question = f"{IMAGE}\n{text}"
    examples = [asked(text, image=name, instruction=question) for name in ("a.png", file_name(text))]
    groups = [record_page.Group("avqa", text, 2, examples)]
    record_page.page(tmp_path / "page.html", groups, {text: 3}, 2, text, tmp_path, tokenizer, config)
    return (tmp_path / "page.html").read_text()


def reviewed(text, tmp_path, tokenizer):
    return review_page.page([asked(text)], [(asked(text, image=file_name(text), mask="rle:" + text), [text])], tmp_path)


PAGES = (plain, results, clip, data_sample, reviewed)


@pytest.mark.parametrize("written", PAGES, ids=lambda one: one.__name__)
def test_no_text_adds_anything_to_a_page(written, tmp_path, tokenizer):
    usual = Found(written(HARMLESS, tmp_path, tokenizer))
    for text in HOSTILE:
        html = written(text, tmp_path, tokenizer)
        found = Found(html)
        assert found.found <= usual.found, (text, found.found - usual.found)
        assert found.scripts == usual.scripts  # no style or script either
        assert printable(html.replace("\n", "").replace("\t", "")) == html.replace("\n", "").replace("\t", ""), text
        assert "\0" not in html


@pytest.mark.parametrize("written", PAGES, ids=lambda one: one.__name__)
def test_a_page_shows_the_text_as_it_is(written, tmp_path, tokenizer):
    for text in ("<script>alert(1)</script>", "a & b", "&lt;"):
        assert text in "".join(Found(written(text, tmp_path, tokenizer)).texts)


@pytest.mark.parametrize("written", PAGES, ids=lambda one: one.__name__)
def test_a_page_may_fetch_nothing_and_run_its_own_script_alone(written, tmp_path, tokenizer):
    html = written(HARMLESS, tmp_path, tokenizer).split("<!doctype html>")[1]
    policy = re.search(r'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="(.*?)">', html)
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#x27;", "'").split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == rules["media-src"] == "data:"
    scripts = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in scripts]
    assert rules.get("script-src", "") == " ".join(hashes)
    assert not re.search(r"""(?:src|href)=["']?(?!data:|#)\w""", html)


def test_html_takes_other_text_as_text():
    bold = Html("<b>{}</b>").format("<i>")
    assert bold == "<b>&lt;i&gt;</b>" and isinstance(bold, Html)
    assert bold + "<" == bold + Html("&lt;") and Html("<br>").join(["<", bold]) == f"&lt;<br>{bold}"
    assert "&lt;p&gt;" in page.document("t", "<p>")  # what forgot to say that it is Html is seen as text


@pytest.mark.parametrize("text", ODD)
def test_what_is_printed_is_one_line_without_control_characters(text, capsys):
    say(InputError(text, text, text, text))
    on_stderr(text)
    out = capsys.readouterr().err
    assert out.count("\n") == 2 and out.isascii() | out.replace("\n", "").isprintable()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\ud800]", out)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_markdown_card_has_its_own_cells_alone(text):
    examples = [asked(text, meta={"dataset": text, "reasoning": text})]
    usual = card.markdown(card.card([asked(HARMLESS)]), HARMLESS)
    found = card.markdown(card.card(examples), text)
    assert [line.count("|") - line.count("\\|") for line in found.splitlines()] == [
        line.count("|") for line in usual.splitlines()
    ]
    assert not re.search(r"(?<!\\)[<>`\[]", found) and not cell(text).startswith(("=", "+", "@"))


def test_names_in_pictures_are_no_formulas_and_do_not_make_them_grow():
    tracks = [overlay.Track(text, ((0, 5),)) for text in ("$\\frac{$", "x" * 10**5, "\ud800\x1b[31m")]
    drawn = overlay.timeline(np.zeros(16000, np.float32), np.zeros((0, 1, 1, 3), np.uint8), tracks, 10)
    assert len(drawn) < 100_000
    overlay.overlay_boxes(np.zeros((40, 40, 3), np.uint8), [((1, 1, 99, 99), overlay.TRUTH, text) for text in ODD])
