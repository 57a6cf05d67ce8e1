"""AVCap: prompt, parsing, and caption metrics against their textbook definitions."""

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


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\t\n",
        "</s>",
        "<s>",
        "<s></s>",
        "<unk>",
        "<unk><unk>",
        "<pad>",
        "[INST]",
        "[/INST]",
        "<s>[INST] [/INST]</s>",
        ".",
        "...",
        "!?",
        "--",
        "_",
        "___",
        "()",
        "[]",
        "{}",
        "<>",
        "<<>>",
        "''",
        '""',
        ",;:",
        "\u3000",
        "\x00",
        "\ufffd",
        "。",
        "</S>",
        "<UNK>",
        "*",
        "\\",
    ],
)
def test_texts_without_a_word_give_none(text):
    assert parse(text) is None


def test_words_are_lower_case_runs():
    assert words("A dog's bark, LOUD_noise... 2 cars!") == ["a", "dog's", "bark", "loud", "noise", "2", "cars"]


def captions(rng, count):
    vocabulary = ["a", "dog", "cat", "barks", "runs", "loudly", "the", "red"]
    return [" ".join(rng.choice(vocabulary, int(rng.integers(1, 9)))) for _ in range(count)]


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
    assert reduce([stats(None, None, {"captions": [c]}, None) for c in truth]) == {
        "cider_d": 0.0,
        "bleu4": 0.0,
        "rouge_l": 0.0,
    }
    assert reduce([]) == {}


def test_reduce_ignores_order():
    rng = np.random.default_rng(3)
    samples = [stats(a, None, {"captions": [b]}, None) for a, b in zip(captions(rng, 9), captions(rng, 9), strict=True)]
    assert reduce(samples) == pytest.approx(reduce(samples[::-1]))


def test_the_most_frequent_caption_is_a_constant_answer():
    metas = [{"captions": ["a dog"]}, {"captions": ["a dog"]}, {"captions": ["a red cat runs"]}]
    assert constants(metas, [None] * 3)[0] == ("a dog", None)


@pytest.mark.filterwarnings("ignore")
def test_the_scores_are_those_of_the_coco_caption_package():
    """The package is no dependency (docs/evaluation.md says why); where it is installed, a thousand corpora agree."""
    bleu_of = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    cider_of = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rouge_of = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    rng = np.random.default_rng(4)
    for _ in range(1000):
        truth = [captions(rng, int(rng.integers(1, 3))) for _ in range(int(rng.integers(2, 5)))]
        answers = [refs[0] if rng.random() < 0.6 else captions(rng, 1)[0] for refs in truth]
        metrics = reduce([stats(a, None, {"captions": refs}, None) for a, refs in zip(answers, truth, strict=True)])
        wanted, said = dict(enumerate(truth)), {k: [a] for k, a in enumerate(answers)}
        assert metrics["cider_d"] == pytest.approx(cider_of.compute_score(wanted, said)[0], abs=1e-6)
        assert metrics["rouge_l"] == pytest.approx(rouge_of.compute_score(wanted, said)[0], abs=1e-6)
        theirs = bleu_of.compute_score(wanted, said, verbose=0)[0][3]
        if metrics["bleu4"]:  # it smooths orders without a match, which give 0 here
            assert metrics["bleu4"] == pytest.approx(theirs, abs=1e-6)
        else:
            assert theirs < 0.1
