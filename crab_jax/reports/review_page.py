"""One HTML file for the review of targets: those in quarantine with the reasons, and a sample of the good ones.

The file contains its pictures and needs no network. Ticking a card writes its id into a box at the end of the page.
`verify --accept` and `verify --reject` read the content of these boxes, saved as files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from crab_jax.io.errors import InputError, printable
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import AUDIO, IMAGE, VIDEO
from crab_jax.visualize.overlay import TRUTH, overlay_boxes, overlay_mask
from crab_jax.visualize.page import NONE, Html, document, escape, jpeg, table
from data_pipelines import media
from data_pipelines.av_uie.labels import BOX_SPACE, reasoning_of
from data_pipelines.decoded import inside, read_mask
from data_pipelines.examples import Example

_STYLE = """
article{border-top:1px solid #e4e4e4;padding:.8rem 0;overflow:hidden;break-inside:avoid}
article img{float:right;margin:0 0 .5rem 1rem;max-width:40%}
.id{font:.85rem ui-monospace,monospace;overflow-wrap:anywhere} .by{color:#666;font-size:.85rem} .bad{color:#a33c00}
.tag{background:#e8f1f8;border-radius:.2rem} .answer{font-weight:600} textarea{width:100%;height:7rem}
@media print{textarea,input{display:none}}
"""
_SCRIPT = """
for (const kind of ['accept', 'reject']) {
  const list = document.getElementById(kind), boxes = document.querySelectorAll('input[name=' + kind + ']');
  for (const box of boxes) box.addEventListener('change', () => {
    list.value = [...boxes].filter(b => b.checked).map(b => b.value + '\\n').join('')});
}
"""


def sample(examples: Iterable[Example], per_task: int) -> list[Example]:
    """Return `per_task` Examples of each task, always the same ones: those whose ids have the smallest hashes."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    return [example for listed in by_task.values() for example in sorted(listed, key=_rank)[:per_task]]


def _rank(example: Example) -> bytes:
    return hashlib.sha256(example.id.encode("utf-8", "surrogatepass")).digest()


def page(
    good: Sequence[Example],
    bad: Sequence[tuple[Example, list[str]]],
    root: str | Path | None = None,
    per_task: int = 5,
    most: int = 300,
) -> str:
    """Return the page as HTML.

    good: Examples whose targets agree with their labels; `per_task` of each task are shown. bad: quarantined Examples
    with their reasons; at most `most`, evenly spaced, are shown, and all are counted.
    """
    shown = [bad[i * len(bad) // min(len(bad), most)] for i in range(min(len(bad), most))]
    reasons = Counter(_kind(reason) for _, listed in bad for reason in listed)
    rows = [(str(n), reason) for reason, n in reasons.most_common(30)] or [("", "nothing is in quarantine")]
    picked = sample(good, per_task)
    return document(
        "AV-UIE targets",
        Html("""
<p>{good} agree with their labels, {bad} are in quarantine.</p>
<h2>Why</h2>{reasons}
<h2>Quarantined: {shown} of {bad}</h2>
{quarantined}
<h2>Good: a sample of {picked}</h2>
{sample}
<h2>Your decisions</h2>
<p>Save each box as a file and give it to <code>verify</code>.</p>
<label>--accept<textarea id="accept" spellcheck="false"></textarea></label>
<label>--reject<textarea id="reject" spellcheck="false"></textarea></label>
""").format(
            good=len(good),
            bad=len(bad),
            shown=len(shown),
            picked=len(picked),
            reasons=table((), rows),
            quarantined=NONE.join(_article(example, root, listed) for example, listed in shown),
            sample=NONE.join(_article(example, root, []) for example in picked),
        ),
        _STYLE,
        _SCRIPT,
    )


def _kind(reason: str) -> str:
    """Return a reason without quoted values and numbers, so that equal reasons can be counted."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\d+(?:\.\d+)?", "…", reason)


def _article(example: Example, root: str | Path | None, reasons: Sequence[str]) -> Html:
    question = example.instruction
    for block in (VIDEO, AUDIO, IMAGE):
        question = question.replace(block, "")
    before = reasoning_of(example)
    answer = example.target[example.target.find(before) + len(before) :] if before else example.target
    what, verb = ("reject", "reject") if not reasons else ("accept", "accept all the same")
    listed = NONE.join(Html("<li>{}</li>").format(reason) for reason in reasons)
    problems = Html('<ul class="bad">{}</ul>').format(listed) if reasons else NONE
    label = json.dumps({**example.meta, "second": example.second}, ensure_ascii=False, indent=1)
    return Html(
        '<article>{picture}<div><span class="id">{name}</span> · {task} <span class="by">{by}</span> <label class="by">'
        '<input type="checkbox" name="{what}" value="{name}"> {verb}</label></div>{problems}'
        '<div class="by">{question}</div><p>{before} <span class="answer">{answer}</span></p>'
        "<details><summary>label</summary><pre>{label}</pre></details></article>\n"
    ).format(
        picture=_picture(example, root),
        name=printable(example.id),
        task=example.task,
        by=example.meta.get("reasoning", "plain"),
        what=what,
        verb=verb,
        problems=problems,
        question=question,
        before=_marked(before),
        answer=_marked(answer),
        label=label,
    )


def _marked(text: str) -> Html:
    """Return a text as HTML with its tags highlighted."""
    return Html(re.sub(r"&lt;/?[\w ]{0,40}&gt;", lambda tag: f'<span class="tag">{tag[0]}</span>', escape(text)))


def _picture(example: Example, root: str | Path | None) -> Html:
    """Return an <img> of the frame with the labelled mask or box; NONE without one or where it cannot be read."""
    path = example.seg_image or example.image or (example.frames[example.second or 0] if example.frames else None)
    task = TASKS[example.task]
    if root is None or path is None or not (example.mask or task.answer == "box"):
        return NONE
    try:
        picture = media.read_image(inside(root, path), BOX_SPACE)
        if example.mask:
            mask = read_mask(root, example, BOX_SPACE)
            picture = overlay_mask(picture, mask.astype(bool) if example.mask_kind == "binary" else mask, TRUTH)
        elif box := task.box(example.meta):
            picture = overlay_boxes(picture, [(box, TRUTH, "")])
    except (InputError, IndexError, KeyError, TypeError, ValueError):  # bad labels and files are expected here
        return NONE
    return jpeg(picture, "")
