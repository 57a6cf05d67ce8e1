"""What models really write: cut off, repeated, mistagged, in other scripts. No parser and no metric fails on it."""

import json

import numpy as np
import pytest

from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK

METAS = {
    "avqa": {"answer": "two", "type": ["Audio", "Counting"]},
    "ave": {"event": "Male speech, man speaking", "start": 2, "end": 8},
    "avvp": {"audio": [["Dog", 0, 10]], "visual": [["Dog", 0, 1], ["Frying_(food)", 3, 6]]},
    "arig": {"object": "dog", "box": [21, 72, 196, 140]},
    **{name: {"objects": ["dog"], "video": "a"} for name in ("s4", "ms3", "avss")},
    "ref-avs": {"expression": "the loud one", "object": "tuba", "split": "seen"},
    "avcap": {"captions": ["a dog barks at a man"]},
}
LABELS = {  # of `target`
    **METAS,
    "avqa": {"answer": "two"},
    "avcap": {"caption": "a dog barks at a man"},
    **{name: {"objects": ["dog"], "second": 3} for name in ("s4", "ms3", "avss")},
    "ref-avs": {"expression": "the loud one", "object": "tuba", "second": 3},
}
TARGETS = [TASKS[name].target(**label) for name, label in LABELS.items()]

WRITTEN = [
    "",
    " ",
    "\n\n",
    "\x00",
    "\ufffd" * 9,
    "\u202etxet\u202c",
    "😀🎸",
    "</s>",
    "<s>",
    "<unk>" * 50,
    "<pad>",
    "[/INST]",
    "<",
    ">",
    "<>",
    "</>",
    "<<<>>>",
    "()",
    "(,)",
    "(1)",
    "(1,)",
    "(1,2",
    "1,2)",
    "((1,2),(3,4))",
    "(1 2 3 4)",
    "[1,2,3,4]",
    "(-5,-7) and (3,9)",
    "(1e9,2) (3,4)",
    "(nan,nan) (inf,inf)",
    "(NaN,1) and (2,3)",
    "(0x10,2) (3,4)",
    "(٣,٤) (٥,٦)",
    "(²,³) (⁴,⁵)",
    "(1.5.2,3) (4,5)",
    "(9" + "9" * 400 + ",1) (2,3)",
    "(1,2) (" + "9" * 400 + ",3)",
    "top left (5,5) bottom right (5,5)",
    "top left top left (1,2) top left",
    "(3,4) top left (1,2)",
    "(１,２) (３,４)",
    "(0,0) (0,0)",
    "(224,224) (224,224)",
    "<event>",
    "</event>",
    "<event></event>",
    "<event/>",
    "<event><range>",
    "<range>0,8</range>",
    "<event>x<range>y</range>",
    "<event> Dog </event> <range> 8,2 </range>",
    "<event> Dog </event> <range> -1,5 </range>",
    "<event> Dog </event> <range> a,b </range>",
    "<event> Dog </event> <range> 0,99999999999 </range>",
    "<event> Dog </event> <range> 0 - </range>",
    "<event> Dog </event> <range> ,, </range>",
    "<event> Dog </event> <range> ٠,٨ </range>",
    "<event> Dog </event> <range> 0.5.5,1 </range>",
    "<event> 0,8 </event> <range> 0,8 </range>",
    "<event> , </event> <range> 0,8 </range>",
    "<event><event>Dog</event></event><range>0,8</range>",
    "<event> Dog </range> <range> 0,8 </event>",
    "<answer>",
    "</answer>two",
    "<answer></answer>",
    "<answer><answer>two</answer></answer>",
    "<answer two>",
    "<ANSWER>2",
    "<answer>two</answer><answer>three</answer>",
    "<answer> </answer> two",
    "answer: two",
    "<answer>two\x00</answer>",
    "<answer>" + "two " * 3000 + "</answer>",
    "<answer>&lt;two&gt;</answer>",
    '{"answer": "two"}',
    "**two**",
    "<audio_event>",
    "<audio_event></audio_event>",
    "<audio_event>,(0 8)</audio_event>",
    "<visual_event>(0 8)</visual_event>",
    "<audio_event>Dog,(8 0)</audio_event>",
    "<audio_event>Dog,(0 0)</audio_event>",
    "<audio_event>Dog,()</audio_event>",
    "<audio_event>Dog,(0 8),(0 8),(0 8)</audio_event>",
    "<audio_event>Dog,(-3 999999)</audio_event>",
    "<audio_event>Dog,(0 8)<visual_event>Cat,(0 8)",
    "<audio>Dog</audio><visual>Cat</visual>",
    "<audio_event>(((((</audio_event>",
    "<audio_event>none</audio_event>",
    "<audio_event>none,(0 8)</audio_event>",
    "<visual_event>and,(0 8)</visual_event>",
    "<audio_event>1,(0 8)</audio_event>",
    "<audio_event>Dog,(0 8),Cat,(1</audio_event>",
    "<audio_event>Dog 0 8</audio_event>",
    MASK,
    MASK * 3,
    "<mask_0><mask_1>",
    "<mask_start><mask_end>",
    "<mask_5>" * 40,
    MASK[::-1],
    "The object making the sound in the video is",
    "The object making the sound in the video is .",
    "The object making the sound in the video is dog",
    "The object making the sound in the video is and. The mask is",
    "The object making the sound in the video is dog and . The mask of",
    "object making sound in the image is dog. The mask",
    "object making the sound in the video is " * 40,
    "The object making the sound in the video is dog.The mask",
    "At the first second in the video,",
    "At the first second in the video, is . Its mask is",
    "does not appear",
    "second in the video, it does not appear. Its mask",
    "second in the video, " * 50,
    ". Its mask . Its mask . Its mask",
    "At the first second in the video, it is is is. Its mask is",
    "is is is. Its mask is",
    "The mask of the mask of the mask",
    "a",
    "A dog.",
    "a " * 2000,
    "...",
    "dog" * 3000,
    "'",
    "''''",
    "don't can't won't",
    "___",
    "-",
    "1 2 3 4 5",
    "ß ﬁ Ǆ İ",
    "null",
    "None",
    "[]",
    "{}",
    "true",
    "<html><body>two</body></html>",
    "I cannot answer this question.",
    "%s %d {0} {x}",
    "<event>" * 1000,
    "</event>" * 1000,
    "(" * 3000,
    ")" * 3000,
    "0" * 5000,
    "1,2," * 1500,
    "<" * 3000,
    "<answer" * 700,
    "<event> " + " " * 4000,
    "(" + " " * 3000 + "1",
    "top left " * 600,
    ". " * 3000,
    " and " * 800,
    "<range> 1 " * 500,
]


def corrupted(text):
    """The ways in which a generation of `text` goes wrong."""
    words = text.split(" ")
    yield from (text[: len(text) * k // 8] for k in range(1, 8))  # out of tokens
    yield from (text[len(text) * k // 4 :] for k in range(1, 4))
    yield from (text * 3, text.upper(), text.swapcase(), text[::-1], text.replace(" ", ""), text.replace(" ", "\n\t"))
    yield from (text.replace("<", "").replace(">", ""), text.replace("<", "< ").replace(">", " >"))
    yield from (text.replace("/", ""), text.replace("<", "&lt;"), text.replace("<", "["), text.replace(",", " "))
    for digits in ("", "x", "-1", "99999", "1e5", "½", "٣", "one"):
        yield "".join(digits if c.isdigit() else c for c in text)
    yield from (" ".join(words[::-1]), " ".join(w for w in words for _ in range(2)), " ".join(words[::2]))


CORPUS = list(dict.fromkeys([*WRITTEN, *(bad for text in TARGETS for bad in corrupted(text))]))
GT = np.zeros((6, 6), np.int32)
GT[2:5, 1:4] = 1


def test_the_corpus_is_large():
    assert len(CORPUS) >= 300 and len(set(WRITTEN)) >= 120


@pytest.mark.parametrize("name", TASKS)
def test_nothing_that_a_model_writes_breaks_the_task(name):
    task = TASKS[name]
    gt = GT if task.mask_kind != "none" else None
    samples, readable = [], 0
    for text in CORPUS:
        parsed = task.parse(text)
        json.dumps(parsed, allow_nan=False)  # predictions.jsonl holds it
        readable += parsed is not None
        for mask in (None, GT.astype(float)) if gt is not None else (None,):
            samples.append(task.stats(parsed, mask if mask is None or name != "avss" else GT, METAS[name], gt))
            one = task.reduce(samples[-1:])
            assert set(one) <= set(task.metrics)
            assert all(np.isfinite(value) and -2 <= value <= 10 for value in one.values()), (text, one)
    assert all(np.isfinite(value) for value in task.reduce(samples).values())
    assert readable < len(CORPUS) and task.parse(TARGETS[list(LABELS).index(name)]) is not None
