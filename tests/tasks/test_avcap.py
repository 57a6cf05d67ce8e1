"""AVCap: prompt, parsing, and caption metrics against their textbook definitions."""

import math
from collections import Counter

import numpy as np
import pytest

from crab_jax.tasks.avcap import bleu, bleu_counts, constants, instruction, parse, reduce, rouge_l, stats, target, words


def test_prompts_are_the_released_ones():
    head = "This is a video:\n<video_start><video><video_end>\nThis is an audio:\n<audio_start><audio><audio_end>\n"
    assert instruction() == head + "Please describe this video and audio."
    assert instruction("test") == head + "Please describe this video."


def test_target_is_the_caption():
    assert target("A dog barks.") == "A dog barks."
    assert parse(f"<s>{target('A dog barks.')}</s><unk><unk>") == "A dog barks."


@pytest.mark.parametrize("text", [
    "", " ", "\n", "\t\n", "</s>", "<s>", "<s></s>", "<unk>", "<unk><unk>", "<pad>", "[INST]", "[/INST]",
    "<s>[INST] [/INST]</s>",
    ".", "...", "!?", "--", "_", "___", "()", "[]", "{}", "<>", "<<>>", "''", '""', ",;:", "\u3000", "\x00", "\ufffd",
    "。", "</S>",
    "<UNK>", "*", "\\",
])
def test_texts_without_a_word_give_none(text):
    assert parse(text) is None


def test_words_are_lower_case_runs():
    assert words("A dog's bark, LOUD_noise... 2 cars!") == ["a", "dog's", "bark", "loud", "noise", "2", "cars"]


def captions(rng, count):
    vocabulary = ["a", "dog", "cat", "barks", "runs", "loudly", "the", "red"]
    return [" ".join(rng.choice(vocabulary, int(rng.integers(1, 9)))) for _ in range(count)]


def grams(tokens, n):
    return Counter(tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1))


def brute_cider(candidates, references):
    """CIDEr-D straight from its definition, with dictionaries."""
    frequency = Counter()
    for refs in references:
        frequency.update({g for r in refs for n in range(1, 5) for g in grams(r, n)})

    def vector(tokens, n):
        return {g: c * (math.log(len(references)) - math.log(max(1, frequency[g]))) for g,
                c in grams(tokens, n).items()}

    def norm(v):
        return math.sqrt(sum(x * x for x in v.values()))

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        values = []
        for reference in refs:
            for n in range(1, 5):
                c, r = vector(candidate, n), vector(reference, n)
                dot = sum(min(c[g], r[g]) * r[g] for g in c if g in r)
                cosine = dot / (norm(c) * norm(r)) if norm(c) * norm(r) > 0 else 0.0
                values.append(cosine * math.exp(-((len(candidate) - len(reference)) ** 2) / 72))
        scores.append(10 * np.mean(values))
    return np.mean(scores)


def brute_bleu(candidates, references):
    precisions = []
    for n in range(1, 5):
        hits = total = 0
        for candidate, refs in zip(candidates, references, strict=True):
            for gram, times in grams(candidate, n).items():
                hits += min(times, max(grams(r, n)[gram] for r in refs))
                total += times
        precisions.append(hits / total if total else 0)
    if min(precisions) == 0:
        return 0.0
    length = sum(map(len, candidates))
    closest = sum(min((abs(len(r) - len(c)), len(r)) for r in refs)[1] for c,
                  refs in zip(candidates, references, strict=True))
    return math.exp(sum(map(math.log, precisions)) / 4) * (1 if length > closest else math.exp(1 - closest / length))


@pytest.mark.parametrize("seed", range(5))
def test_corpus_scores_equal_their_definitions(seed):
    rng = np.random.default_rng(seed)
    truth = [captions(rng, int(rng.integers(1, 4))) for _ in range(12)]
    answers = [refs[0] if rng.random() < 0.4 else captions(rng, 1)[0] for refs in truth]
    metrics = reduce([stats(a, None, {"captions": refs}, None) for a, refs in zip(answers, truth, strict=True)])
    tokens, token_refs = [words(a) for a in answers], [[words(r) for r in refs] for refs in truth]
    assert metrics["cider_d"] == pytest.approx(brute_cider(tokens, token_refs))
    assert metrics["bleu4"] == pytest.approx(brute_bleu(tokens, token_refs))


def test_known_values():
    the_cat = words("the cat is on the mat")
    assert bleu(bleu_counts(the_cat, [the_cat])) == pytest.approx(1.0)
    counts = bleu_counts(["the"] * 7, [the_cat])
    assert counts[0] == 2 and counts[4] == 7  # the clipped unigram example of the BLEU paper
    # LCS of 3 words, precision 3/4, recall 3/4: F is 3/4 for every beta
    assert rouge_l(words("police kill the gunman"), [words("police killed the gunman")]) == pytest.approx(0.75)
    assert rouge_l([], [the_cat]) == 0.0


def test_perfect_captions_reach_the_top_and_empty_ones_the_bottom():
    truth = ["a dog barks loudly", "the red cat runs away", "rain falls on a tin roof"]
    best = reduce([stats(c, None, {"captions": [c]}, None) for c in truth])
    assert best == pytest.approx({"cider_d": 10.0, "bleu4": 1.0, "rouge_l": 1.0})
    assert reduce([stats(None, None, {"captions": [c]}, None) for c in truth]) == {"cider_d": 0.0, "bleu4": 0.0,
                                                                                   "rouge_l": 0.0}
    assert reduce([]) == {}


def test_reduce_ignores_order():
    rng = np.random.default_rng(3)
    samples = [stats(a, None, {"captions": [b]}, None) for a, b in zip(captions(rng, 9), captions(rng, 9), strict=True)]
    assert reduce(samples) == pytest.approx(reduce(samples[::-1]))


def test_the_most_frequent_caption_is_a_constant_answer():
    metas = [{"captions": ["a dog"]}, {"captions": ["a dog"]}, {"captions": ["a red cat runs"]}]
    assert constants(metas, [None] * 3)[0] == ("a dog", None)
