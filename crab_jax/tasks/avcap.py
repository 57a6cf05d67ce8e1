"""AVCap: one sentence about what is seen and heard (VALOR).

meta: `{"captions": [str, ...]}`, the reference captions of the clip. Prompt: dataset/unified_dataset.py. The released
code has no caption metric; BLEU-4, ROUGE-L and CIDEr-D are written here from their definitions. The package that holds
all three, pycocoevalcap, is a download of 104 MB with Java programs in it and was last released in 2020. On the same
words its scorers give the same CIDEr-D and ROUGE-L, and the same BLEU-4 except that it smooths empty matches. Its Penn
Treebank tokeniser is written in Java. Words here are runs of letters, digits and apostrophes in lower case, so scores
are comparable among runs of this code, and close but not equal to tables made with that tokeniser.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks.placeholders import AUDIO, VIDEO
from crab_jax.tasks.rows import CLIP, only
from crab_jax.tasks.task import TEXTS, Made, Meta, Oddity, Row, Stats, Task, is_text, says_nothing
from crab_jax.tasks.text import plain

METRICS = {
    "cider_d": "CIDEr-D over 1- to 4-grams, in [0, 10] (COCO captions call it CIDEr)",
    "bleu4": "corpus BLEU-4, closest reference length",
    "rouge_l": "mean ROUGE-L F, beta 1.2 (COCO captions)",
}
ORDERS = 4  # n-grams of one to four words
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0  # width of CIDEr-D's length penalty, in words
_CIDER_SCALE = 10.0
_CIDER_COLUMNS = ("key", "order", "pair", "candidate", "reference", "first")
SOUND_PROMPT = f"{AUDIO}Please describe this audio."  # for a sound without pictures: dataset/pretrain_dataset.py
_INSTRUCTIONS = {
    "train": f"{VIDEO}{AUDIO}Please describe this video and audio.",
    "test": f"{VIDEO}{AUDIO}Please describe this video.",
    "quick": f"{VIDEO}{AUDIO}Please describe this video.",
}


def instruction(variant: str = "train") -> str:
    """Return the prompt; "test" and "quick" of the release are one text, which does not mention the audio."""
    return _INSTRUCTIONS[variant]


def target(caption: str, reasoning: str = "") -> str:
    """Return the caption, after the reasoning if there is any."""
    return f"{reasoning} {caption}" if reasoning else caption


def parse(text: str) -> str | None:
    """Return the text without control tokens, or None when it holds no word."""
    caption = plain(text)
    return caption if words(caption) else None


def words(text: str) -> list[str]:
    """Return the runs of letters, digits and apostrophes in lower case."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Count how often each run of `order` words occurs."""
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def bleu_counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the counts of BLEU for one clip, whose sums over a corpus give corpus BLEU (Papineni et al. 2002).

    Returns float[2*ORDERS+2]: clipped matches and totals per order, candidate length, closest reference length.
    """
    matches, totals = [], []
    for order in range(1, ORDERS + 1):
        found = ngrams(candidate, order)
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            allowed |= ngrams(reference, order)
        matches.append((found & allowed).total())
        totals.append(found.total())
    closest = min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    return np.array([*matches, *totals, len(candidate), closest], float)


def bleu(counts: np.ndarray) -> float:
    """Return BLEU-4 in [0, 1] from summed `bleu_counts`: geometric mean of precisions times brevity penalty."""
    matches, totals, (length, reference_length) = counts[:ORDERS], counts[ORDERS : 2 * ORDERS], counts[2 * ORDERS :]
    if not np.all(matches > 0):
        return 0.0
    return float(np.exp(np.mean(np.log(matches / totals)) + min(0.0, 1 - reference_length / length)))


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L F (beta 1.2) of the best precision and the best recall of a common subsequence over references."""
    common = [_common_subsequence(candidate, reference) for reference in references]
    precision = max(c / max(1, len(candidate)) for c in common)
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    beta2 = _ROUGE_BETA**2
    return (1 + beta2) * precision * recall / (recall + beta2 * precision) if precision and recall else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def cider_counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return n-gram counts of each (candidate, reference) pair, as rows over the n-grams of either text.

    key: int64 hash of the n-gram. order: 0..3. pair: index of the reference. candidate, reference: counts. first: 1
    where the row is the only one of this clip that counts for document frequency. penalty: float[R] length penalty.
    """
    rows: list[tuple[int, ...]] = []
    seen: set[tuple[str, ...]] = set()
    for order in range(1, ORDERS + 1):
        found = ngrams(candidate, order)
        for pair, reference in enumerate(references):
            wanted = ngrams(reference, order)
            for gram in found | wanted:
                key = int.from_bytes(hashlib.blake2b(" ".join(gram).encode(), digest_size=8).digest(), signed=True)
                rows.append((key, order - 1, pair, found[gram], wanted[gram], gram in wanted and gram not in seen))
            seen |= wanted.keys()
    columns = zip(_CIDER_COLUMNS, np.array(rows, np.int64).reshape(-1, len(_CIDER_COLUMNS)).T, strict=True)
    penalty = np.array([np.exp(-((len(candidate) - len(r)) ** 2) / (2 * _CIDER_SIGMA**2)) for r in references])
    return dict(columns) | {"penalty": penalty}


def cider_d(samples: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Return CIDEr-D of a corpus (Vedantam et al. 2015), which is 10 for a perfect match of all orders.

    Each order has a tf-idf vector with idf = log(N / clips whose references hold the n-gram). The score is the clipped
    cosine of a pair times its length penalty, averaged over orders, references and clips.
    """
    joined = {name: np.concatenate([s[name] for s in samples]) for name in _CIDER_COLUMNS}
    pairs = np.array([len(s["penalty"]) for s in samples])
    offsets = np.repeat(np.cumsum(pairs) - pairs, [len(s["key"]) for s in samples])
    cell = (offsets + joined["pair"]) * ORDERS + joined["order"]
    _, gram = np.unique(joined["key"], return_inverse=True)
    frequency = np.bincount(gram, weights=joined["first"])
    idf = (np.log(len(samples)) - np.log(np.maximum(1.0, frequency)))[gram]
    candidate, reference = joined["candidate"] * idf, joined["reference"] * idf

    def per_cell(values: np.ndarray) -> np.ndarray:
        return np.bincount(cell, weights=values, minlength=pairs.sum() * ORDERS)

    norms = np.sqrt(per_cell(candidate**2) * per_cell(reference**2))
    cosine = per_cell(np.minimum(candidate, reference) * reference) / np.where(norms > 0, norms, 1.0)
    similarity = cosine.reshape(-1, ORDERS).mean(1) * np.concatenate([s["penalty"] for s in samples])
    clip = np.repeat(np.arange(len(samples)), pairs)
    return float(_CIDER_SCALE * np.mean(np.bincount(clip, weights=similarity) / pairs))


def stats(parsed: str | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None) -> Stats:
    """Return the counts of one clip; an unreadable caption counts as an empty one."""
    if isinstance(meta["captions"], str):
        raise TypeError("captions must be a list of texts")
    candidate, references = words(parsed or ""), [words(caption) for caption in meta["captions"]]
    return {
        "bleu": bleu_counts(candidate, references),
        "rouge_l": rouge_l(candidate, references),
        "cider": cider_counts(candidate, references),
    }


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return bleu4 and rouge_l in [0, 1] and cider_d in [0, 10]; BLEU and CIDEr-D are of the corpus, no means."""
    if not samples:
        return {}
    return {
        "cider_d": cider_d([s["cider"] for s in samples]),
        "bleu4": bleu(np.sum([s["bleu"] for s in samples], axis=0)),
        "rouge_l": float(np.mean([s["rouge_l"] for s in samples])),
    }


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]) -> list[tuple[str, None]]:
    """Return the most frequent caption and the three captions with the most common words."""
    captions = Counter(caption for meta in metas for caption in meta["captions"])
    holding = Counter(word for caption, times in captions.items() for word in set(words(caption)) for _ in range(times))
    typical = sorted(captions, key=lambda c: (-np.mean([holding[w] for w in words(c)] or [0]), c))[:3]
    return [(text, None) for text in dict.fromkeys([captions.most_common(1)[0][0], *typical])]


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label: its first caption.

    Raises InputError for a caption that has angle brackets or line breaks.
    """
    caption = meta["captions"][0]
    if not is_text(caption):
        raise InputError("label", "captions", f"is {caption!r:.60}", "must be one line, without angle brackets")
    return {"caption": caption.strip()}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: it is none of the captions."""
    return [] if text in [caption.strip() for caption in meta["captions"]] else ["is none of the captions"]


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield the captions that are words for a missing value or names of files."""
    for caption in meta["captions"]:
        if says_nothing(caption) or re.fullmatch(r"\S+\.\w{2,4}", caption.strip()):
            yield Oddity(True, "captions", f"holds {caption!r:.60}, which is no caption", "write one")


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a clip or only a sound, and one caption or a list of them."""
    captions = row.given("answer")
    texts = [row.text_of("answer", text) for text in (captions if isinstance(captions, list) else [captions])]
    if row.media == {"audio"}:
        prompt = SOUND_PROMPT
    else:
        only(row, *CLIP)
        prompt = instruction()
    return Made(prompt, {"caption": texts[0]}, {"captions": texts}, {"windows": "ten"})


AVCAP = Task(
    name="avcap",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="cider_d",
    metrics=METRICS,
    label={"captions": TEXTS},
    ranked_by="rouge_l",
    shown=lambda meta: str(meta["captions"][0]),
    own_words=True,
    arguments=arguments,
    tags=(),
    disagreements=disagreements,
    oddities=oddities,
    columns=("answer",),
    from_row=from_row,
    sound_alone=True,
    windows=("ten", "none"),
)
