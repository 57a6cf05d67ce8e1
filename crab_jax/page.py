"""A page of results: one HTML file with its pictures inside, that needs no network and fits a phone and paper."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crab_jax.files import write_whole

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
LEGEND = ("<p>In all pictures <b style='color:#009e73'>green</b> is the truth and "
          "<b style='color:#d55e00'>orange</b> the model's answer; semantic masks use the class colours.</p>")


class Picture(NamedTuple):
    """A PNG file and the sentence that says what to look for."""

    data: bytes
    caption: str


class Section(NamedTuple):
    """A part of a page; `body` is HTML, and an empty one is said to be missing."""

    key: str
    title: str
    body: str


def escape(value: Any) -> str:
    """Text as HTML. Names of files may hold bytes that are no text."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def image(data: bytes, alt: str, kind: str = "png") -> str:
    """The content of a PNG (or other) file as an <img>."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def jpeg(picture: np.ndarray, alt: str) -> str:
    """uint8[H,W,3] as an <img>: a tenth of the bytes of a PNG for a photograph."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return image(buffer.getvalue(), alt, "jpeg")


def figure(picture: Picture) -> str:
    """A picture with its caption."""
    caption = escape(picture.caption)
    return f"<figure>{image(picture.data, picture.caption)}<figcaption>{caption}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the head is text, cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return ('<div class="wide"><table><tr>' + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"
            + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>")


def score(scores: Mapping[str, Any], metric: str) -> str:
    """A metric of one task's results (see scoring.summarise) with its interval, "-" when it is not there."""
    if metric not in scores:
        return "-"
    low, high = scores.get("intervals", {}).get(metric, (None, None))
    interval = "" if low is None else f' <span class="ci">[{low:.3f}, {high:.3f}]</span>'
    return f"{scores[metric]:.3f}{interval}"


def document(title: str, body: str, style: str = "") -> str:
    """A whole HTML file: `body` is HTML behind the title, `style` CSS beside that of all pages."""
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}{style}</style></head>'
            f"<body><h1>{escape(title)}</h1>{body}</body></html>\n")


def write(path: str | Path, title: str, intro: str, sections: Sequence[Section], style: str = "") -> None:
    """Write one page; `intro` is HTML, `style` CSS beside that of all pages."""
    parts = [f'<section id="{s.key}"><h2>{escape(s.title)}</h2>{s.body or "<p>Not part of this report.</p>"}</section>'
             for s in sections]
    links = " ".join(f'<a href="#{s.key}">{escape(s.title)}</a>' for s in sections)
    write_whole(path, document(title, f"<nav>{links}</nav>{intro}{''.join(parts)}", style))
