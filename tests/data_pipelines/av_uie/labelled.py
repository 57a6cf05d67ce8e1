"""Examples with plain labels: one of each task by hand, and hypothesis strategies for all of them.

Masks are written in place (run lengths), so that nothing here needs a file.
"""

from __future__ import annotations

import re

import numpy as np
from hypothesis import strategies as st
from pycocotools import mask as coco

from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.av_uie.questions import QUESTIONS
from data_pipelines.examples import Example
from data_pipelines.media import EMPTY_MASK, inline_mask
from data_pipelines.sources import ave, avqa, avvp

SLOTS = {
    "Object": ("violin", "acoustic_guitar", "erhu"),
    "LR": ("left", "right", "middle"),
    "LRer": ("leftest", "rightest"),
    "LL": ("loudest", "lowest"),
    "FL": ("first", "last"),
    "TH": ("first", "fifth"),
    "BA": ("before", "after"),
}
OBJECTS = CLASSES[1:]
EXPRESSIONS = (
    "The object making the loudest sound",
    "The cat on the left of the piano.",
    "the silent object",
    "The object which starts sounding before the man, but is quieter",
    "the red car",
)


def rectangle(x1: int, y1: int, x2: int, y2: int) -> str:
    """An inline mask of 224 x 224 whose pixels from (x1, y1) to (x2, y2), both included, are set."""
    mask = np.zeros((224, 224), np.uint8, order="F")
    mask[y1 : y2 + 1, x1 : x2 + 1] = 1
    return inline_mask(coco.encode(mask))


def example(
    task: str, meta: dict, id: str = "x", second: int | None = None, mask: str | None = None, **prompt: object
) -> Example:
    moment = {} if second is None or task == "arig" else {"second": second}
    return Example(
        id=id,
        task=task,
        instruction=TASKS[task].instruction(**prompt, **moment),
        second=second,
        mask=mask,
        mask_kind=TASKS[task].mask_kind,
        meta=meta,
    )


ONE_EACH = {
    "ave": example("ave", {"event": "Church bell", "start": 3, "end": 8}),
    "avvp": example("avvp", {"audio": [["Speech", 0, 4], ["Dog", 2, 3]], "visual": [["Dog", 0, 10]]}),
    "avqa": example(
        "avqa",
        {"answer": "saxophone", "type": ["Audio-Visual", "Location"]},
        question="What is the left instrument of the first sounding instrument?",
    ),
    "arig": example("arig", {"object": "dog", "box": [53, 59, 153, 177]}, second=1),
    "s4": example("s4", {"objects": ["dog"], "video": "v"}, second=0, mask=rectangle(20, 30, 60, 80)),
    "ms3": example("ms3", {"objects": ["guitar", "man"], "video": "v"}, second=4, mask=rectangle(150, 0, 223, 90)),
    "avss": example("avss", {"objects": ["dog"], "video": "v"}, second=9),
    "ref-avs": example(
        "ref-avs",
        {"expression": "the object making the loudest sound", "object": "guitar", "split": "seen"},
        second=2,
        mask=rectangle(0, 150, 40, 223),
        expression="the object making the loudest sound",
    ),
    "avcap": example("avcap", {"captions": ["With the rumble, on a moving bus, a crowd spoke."]}),
}
ALL = [Example(**{**vars(one), "id": f"{task}-0"}) for task, one in ONE_EACH.items()]

seconds = st.integers(0, 9)
coordinates = st.tuples(*[st.integers(0, 223)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
masks = st.one_of(st.just(EMPTY_MASK), coordinates.map(lambda box: rectangle(*box)))


@st.composite
def asked(draw: st.DrawFn) -> str:
    template = draw(st.sampled_from(QUESTIONS)).template
    return re.sub(r"<(\w+)>", lambda slot: draw(st.sampled_from(SLOTS[slot[1]])), template)


def spans(names: tuple[str, ...]) -> st.SearchStrategy[list]:
    """Events as annotations hold them: empty, reversed, touching and overlapping spans included."""
    return st.lists(st.tuples(st.sampled_from(names), st.integers(0, 10), st.integers(0, 10)).map(list), max_size=6)


def of_avs(task: str) -> st.SearchStrategy[Example]:
    return st.builds(
        lambda objects, second, mask: example(task, {"objects": objects, "video": "v"}, second=second, mask=mask),
        st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=3, unique=True),
        seconds,
        masks,
    )


STRATEGIES: dict[str, st.SearchStrategy[Example]] = {
    "ave": st.builds(
        lambda event, span: example("ave", {"event": event, "start": min(span), "end": max(span)}),
        st.sampled_from(ave.CATEGORIES),
        st.tuples(st.integers(0, 10), st.integers(0, 10)),
    ),
    "avvp": st.builds(
        lambda audio, visual: example("avvp", {"audio": audio, "visual": visual}),
        spans(avvp.CATEGORIES),
        spans(avvp.CATEGORIES),
    ),
    "avqa": st.builds(
        lambda question, answer, kind: example("avqa", {"answer": answer, "type": kind}, question=question),
        asked(),
        st.sampled_from(avqa.ANSWERS),
        st.sampled_from([["Audio", "Counting"], []]),
    ),
    "arig": st.builds(
        lambda name, box: example("arig", {"object": name, "box": list(box)}, second=0),
        st.sampled_from(OBJECTS),
        coordinates,
    ),
    "s4": of_avs("s4"),
    "ms3": of_avs("ms3"),
    "ref-avs": st.builds(
        lambda expression, name, second, mask: example(
            "ref-avs",
            {"expression": expression, "object": name, "split": "seen" if name else "null"},
            second=second,
            mask=mask if name else EMPTY_MASK,
            expression=expression,
        ),
        st.sampled_from(EXPRESSIONS),
        st.sampled_from(("", *OBJECTS)),
        seconds,
        masks,
    ),
    "avcap": st.builds(
        lambda caption: example("avcap", {"captions": [caption]}),
        st.text("abcdefgh ,.'", min_size=1).filter(lambda text: text.strip()),
    ),
}
