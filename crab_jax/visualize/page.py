"""HTML pages of results: one file with its pictures inside, which needs no network and fits phones and paper."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crab_jax.io.errors import printable, printable_lines
from crab_jax.io.files import write_whole

_STYLE = """
:root{color-scheme:light} body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;margin:0 auto;
max-width:60rem;padding:1rem} h1{font-size:1.6rem} h2{font-size:1.25rem;border-bottom:1px solid #ddd;margin-top:2.2rem}
figure{margin:1.2rem 0;break-inside:avoid} img{max-width:100%;height:auto}
figcaption{font-size:.9rem;color:#555} .grid{display:flex;flex-wrap:wrap;gap:1.2rem} .grid figure{margin:0;width:17rem}
.grid img{width:100%} .wide{overflow-x:auto} table{border-collapse:collapse;font-size:.85rem}
th,td{text-align:left;padding:.25rem .6rem .25rem 0;border-bottom:1px solid #e4e4e4;vertical-align:top}
th{font-weight:600} .ci{color:#666;white-space:nowrap} pre{white-space:pre-wrap;font-size:.8rem}
nav a{margin-right:.9rem;white-space:nowrap} @media print{nav{display:none} body{font-size:11pt;max-width:none}
.wide{overflow:visible}}
"""
_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)  # forbids fetching, sending and running anything, whatever text a page contains


class Html(str):
    """HTML written by this project.

    Every value put into it by `format`, `+` or `join` is escaped unless it is Html, and pages accept no other text as
    HTML, so text of users and datasets is shown literally. An f-string returns str, not Html.
    """

    def format(self, *args: object, **named: object) -> Html:
        """Return Html with each value in its place, escaped."""
        return Html(str.format(self, *map(escape, args), **{name: escape(value) for name, value in named.items()}))

    def __add__(self, other: str) -> Html:
        return Html(str.__add__(self, escape(other)))

    def join(self, parts: Iterable[str]) -> Html:
        """Return Html of the parts, each escaped, with this between them."""
        return Html(str.join(self, map(escape, parts)))


NONE = Html()
LEGEND = Html(
    "<p>In all pictures <b style='color:#009e73'>green</b> is the truth and "
    "<b style='color:#d55e00'>orange</b> the model's answer; semantic masks use the class colours.</p>"
)


class Picture(NamedTuple):
    """A PNG file and a caption that says what it shows."""

    data: bytes
    caption: str


class Section(NamedTuple):
    """A section of a page; one with an empty body is shown as missing."""

    key: str
    title: str
    body: Html


def escape(value: object) -> Html:
    """Return a value as Html that shows it; Html is returned unchanged.

    Control characters and direction marks are escaped.
    """
    return value if isinstance(value, Html) else Html(html.escape(printable_lines(value)))


def image(data: bytes, alt: str, kind: str = "png") -> Html:
    """Return the content of a PNG (or other) file as an <img>."""
    return Html('<img alt="{}" src="data:image/{};base64,{}">').format(alt, kind, base64.b64encode(data).decode())


def jpeg(picture: np.ndarray, alt: str) -> Html:
    """Return uint8[H,W,3] as a JPEG <img>, which takes a tenth of the bytes of a PNG for photographs."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return image(buffer.getvalue(), alt, "jpeg")


def figure(picture: Picture) -> Html:
    """Return a picture with its caption."""
    return Html("<figure>{}<figcaption>{}</figcaption></figure>").format(image(*picture), picture.caption)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table with text or Html in each cell."""
    names = NONE.join(Html("<th>{}</th>").format(name) for name in head)
    lines = (NONE.join(Html("<td>{}</td>").format(cell) for cell in row) for row in rows)
    return Html('<div class="wide"><table><tr>{}</tr>{}</table></div>').format(
        names, NONE.join(Html("<tr>{}</tr>").format(line) for line in lines)
    )


def score(scores: Mapping[str, Any], metric: str) -> Html:
    """Return a metric of one task's results (see scoring.summarise) with its interval; "-" when it is missing."""
    if metric not in scores:
        return Html("-")
    low, high = scores.get("intervals", {}).get(metric, (None, None))
    interval = NONE if low is None else Html(' <span class="ci">[{}, {}]</span>').format(f"{low:.3f}", f"{high:.3f}")
    return escape(f"{scores[metric]:.3f}") + interval


def document(title: str, body: Html, style: str = "", script: str = "") -> str:
    """Return a whole HTML file with `body` below the title.

    style: CSS added to that of all pages. script: the only script that may run. Both must be written by this project,
    without any other text.
    """
    policy, run = _POLICY, NONE
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, run = f"{policy}; script-src 'sha256-{digest}'", Html(f"<script>{script}</script>")
    return Html(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        'content="{policy}"><title>{title}</title><meta name="viewport" content="width=device-width,'
        'initial-scale=1"><style>{style}</style></head><body><h1>{title}</h1>{body}{run}</body></html>\n'
    ).format(policy=policy, title=printable(title), style=Html(_STYLE + style), body=body, run=run)


def write(path: str | Path, title: str, intro: Html, sections: Sequence[Section], style: str = "") -> None:
    """Write one page; `style` is CSS added to that of all pages."""
    keys = [re.sub(r"[^\w-]+", "-", section.key) for section in sections]
    parts = (
        Html('<section id="{}"><h2>{}</h2>{}</section>').format(
            key, s.title, s.body or Html("<p>Not part of this report.</p>")
        )
        for key, s in zip(keys, sections, strict=True)
    )
    links = (Html('<a href="#{}">{}</a>').format(key, s.title) for key, s in zip(keys, sections, strict=True))
    body = Html("<nav>{}</nav>{}{}").format(Html(" ").join(links), intro, NONE.join(parts))
    write_whole(path, document(title, body, style))
