"""Hook of mkdocs (mkdocs.yml): documents of the top level become pages, and links to code name the file."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parent.parent
# Page of the site -> file of the top level.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of the top level to the pages."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(TOP / file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text with links as the site has them."""
    written = PAGES.get(page.file.src_uri, posixpath.join("docs", page.file.src_uri))
    return _LINK.sub(lambda found: _of_site(found, written, page.file.src_uri), markdown)


def _of_site(found: re.Match[str], written: str, page: str) -> str:
    """Return one link of the file `written`, which is shown as `page`; without its target where that is no page."""
    before, target, anchor, after = found.groups()
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(written), target))
    names = {top: name for name, top in PAGES.items()}
    shown = names.get(file, file.removeprefix("docs/") if file.startswith("docs/") else "")
    if shown:
        return f"{before}{os.path.relpath(shown, posixpath.dirname(page) or '.')}{anchor or ''}{after}"
    if not (TOP / file).exists():
        return found[0]  # mkdocs then says that it is missing
    text = before.lstrip("!")[1:-2]
    return text if text.startswith("`") else f"{text} (`{file}`)"
