"""The site of `make docs`: its pages are there, the modules that they describe can be imported, links lead to pages."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"


def pages(entries: list) -> list[str]:
    """The files that a nav of mkdocs names, in order."""
    found: list[str] = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages(value) if isinstance(value, list) else [value]
    return found


NAV = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"])


@pytest.fixture
def hook(monkeypatch) -> types.ModuleType:
    """docs/site_pages.py, without mkdocs, which tests do without."""
    files = types.ModuleType("mkdocs.structure.files")
    files.File = files.Files = object
    for name in ("mkdocs", "mkdocs.structure"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, files.__name__, files)
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_document_has_a_place_in_the_site_and_every_page_a_file(hook):
    ours = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")} | hook.PAGES.keys()
    assert sorted(NAV) == sorted(ours)
    assert all((REPOSITORY / file).is_file() for file in hook.PAGES.values())


def test_every_module_of_the_api_pages_is_there():
    named = [name for file in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", file.read_text(), re.M)]
    assert "crab_jax.api" in named and len(named) == len(set(named)) > 30
    for name in named:
        assert importlib.import_module(name).__doc__, f"{name} says nothing of itself"


def test_names_that_the_api_pages_link_to_are_there():
    linked = [name for file in (DOCS / "api").glob("*.md") for name in re.findall(r"\]\[([\w.]+)\]", file.read_text())]
    assert linked
    for name in linked:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("index.md", "[a](docs/tiny.md)", "[a](tiny.md)"),
        ("index.md", "![a](docs/images/a.png)", "![a](images/a.png)"),
        ("training.md", "[a](../SECURITY.md#b)", "[a](security.md#b)"),
        ("training.md", "[launch](../launch_slurm.sh)", "launch (`launch_slurm.sh`)"),
        ("training.md", "[a](generation.md#b)", "[a](generation.md#b)"),
        ("api/index.md", "[a](../architecture.md#b)", "[a](../architecture.md#b)"),
        ("training.md", "[a](https://x.org/y.md)", "[a](https://x.org/y.md)"),
        ("training.md", "[a](nothing/here.md)", "[a](nothing/here.md)"),
    ],
)
def test_links_are_those_of_the_site(hook, page, written, shown):
    view = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page))
    assert hook.on_page_markdown(f"x {written} y", page=view, config=None) == f"x {shown} y"
