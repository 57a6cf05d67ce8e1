"""Reading tagged answers: tags and names in text that a model wrote, possibly badly."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CLOSING = r"(?P<closed><\s*/\s*(?!s\s*>))?"  # any closing tag but the end-of-text token </s>
_CONTROL = re.compile(r"</?s>|<unk>|<pad>|\[/?INST\]", re.IGNORECASE)
_TEMPLATE_TAIL = re.compile(r",?\s+and\s+the\s+|\.(?:\s|$)|\n")  # where the sentence around an unclosed tag goes on

_SMALL_WORDS = frozenset(("a", "an", "the", "and"))
_NOTHING = frozenset(("null", "none", "nothing"))
_PLURALS = {"men": "man", "women": "woman", "geese": "goose", "wolves": "wolf", "babies": "baby", "buses": "bus"}


def normalise(name: str) -> str:
    """Lower-case words of a name; underscores, punctuation and runs of spaces become one space."""
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def object_words(names: Sequence[str]) -> frozenset[str]:
    """What object names say, however they are written: their words in lower case and singular, without articles.

    "guitar_man", as the release joins two objects, says the same as "guitar" and "man", and "emergency-car" the same as
    "an emergency car". Names that say that there is nothing ("null", "none") say nothing.
    """
    words = {_singular(word) for name in names for word in normalise(name).split()} - _SMALL_WORDS
    return frozenset() if words <= _NOTHING else frozenset(words)


def _singular(word: str) -> str:
    """A word without the ending of a plural; the same word always gives the same."""
    if word in _PLURALS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return _PLURALS.get(word, word)
    return word[:-2] if word.endswith(("ches", "shes", "sses")) else word[:-1]


def one_tag(text: str, tag: str) -> tuple[str, list[str]]:
    """The content of the one `tag` that there should be in a target, and what is wrong."""
    contents = [content for _, content in find_tags(text, (tag,))]
    return (
        contents[-1] if contents else "",
        [] if len(contents) == 1 else [f"{len(contents)} <{tag}> tags where one is needed"],
    )


def plain(text: str) -> str:
    """`text` without the control tokens of the tokenizer and the chat template, on one line."""
    return " ".join(_CONTROL.sub(" ", text).split())


def find_tags(text: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """`(name, content)` of every tag, in order; `name` is the entry of `names` (lower case, words joined by "_").

    Case, spaces inside the angle brackets and "_", "-" or " " between words do not matter. A tag that is never closed
    ends at the next "<" or where the sentence around it goes on; unclosed tags are returned only when no tag of that
    name is closed, because a text cut off in the middle of a repetition ends in half an answer.
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
