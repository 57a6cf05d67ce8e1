"""Reading of tags and names in text that a model wrote, possibly badly."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CLOSING = r"(?P<closed><\s*/\s*(?!s\s*>))?"  # any closing tag but the end-of-text token </s>
_CONTROL = re.compile(r"</?s>|<unk>|<pad>|\[/?INST\]", re.IGNORECASE)
_TEMPLATE_TAIL = re.compile(r",?\s+and\s+the\s+|\.(?:\s|$)|\n")  # where the template goes on after an unclosed tag

_SMALL_WORDS = frozenset(("a", "an", "the", "and"))
_NOTHING = frozenset(("null", "none", "nothing"))
_PLURALS = {"men": "man", "women": "woman", "geese": "goose", "wolves": "wolf", "babies": "baby", "buses": "bus"}


def normalise(name: str) -> str:
    """Return a name in lower case, with underscores, punctuation and runs of spaces as one space."""
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def object_words(names: Sequence[str]) -> frozenset[str]:
    """Return the words of object names in lower case and singular, without articles, for comparison.

    "guitar_man", as the release joins two objects, equals "guitar" and "man", and "emergency-car" equals "an emergency
    car". Names that stand for no object ("null", "none") give no words.
    """
    words = {_singular(word) for name in names for word in normalise(name).split()} - _SMALL_WORDS
    return frozenset() if words <= _NOTHING else frozenset(words)


def _singular(word: str) -> str:
    """Return a word without its plural ending."""
    if word in _PLURALS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return _PLURALS.get(word, word)
    return word[:-2] if word.endswith(("ches", "shes", "sses")) else word[:-1]


def one_tag(text: str, tag: str) -> tuple[str, list[str]]:
    """Return the content of the last `tag` of a target, and a problem unless there is exactly one."""
    contents = [content for _, content in find_tags(text, (tag,))]
    return (
        contents[-1] if contents else "",
        [] if len(contents) == 1 else [f"{len(contents)} <{tag}> tags where one is needed"],
    )


def plain(text: str) -> str:
    """Return `text` on one line, without the control tokens of the tokenizer and the chat template."""
    return " ".join(_CONTROL.sub(" ", text).split())


def find_tags(text: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return `(name, content)` of every tag, in order; `name` is the entry of `names` (lower case, joined by "_").

    Case, spaces inside the angle brackets and "_", "-" or " " between words do not matter. A tag that is never closed
    ends at the next "<" or where the sentence of the template goes on. Unclosed tags are returned only when no tag of
    that name is closed, because a text that is cut off while it repeats itself ends in half an answer.
    """
    words = "|".join(sorted((re.escape(n).replace("_", r"[\s_-]*") for n in names), key=len, reverse=True))
    closed: list[tuple[int, str, str]] = []
    unclosed: list[tuple[int, str, str]] = []
    for match in re.finditer(rf"<\s*(?P<name>{words})\s*>(?P<content>[^<]*){_CLOSING}", text, re.IGNORECASE):
        name = next(n for n in names if n.replace("_", "") == re.sub(r"[\s_-]", "", match["name"]).lower())
        if match["closed"]:
            closed.append((match.start(), name, match["content"].strip()))
        else:
            content = _TEMPLATE_TAIL.split(match["content"].strip(), maxsplit=1)[0]
            unclosed.append((match.start(), name, content.strip()))
    done = {name for _, name, _ in closed}
    return [(name, content) for _, name, content in sorted(closed + [tag for tag in unclosed if tag[1] not in done])]
