"""Whatever a label is, the parser reads it back from the target, behind any reasoning and in front of padding."""

from hypothesis import given, settings
from hypothesis import strategies as st

from crab_jax.tasks import TASKS
from crab_jax.tasks.avcap import words
from crab_jax.tasks.text import normalise

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("tests")

# Names as the datasets have them: "Male speech, man speaking", "Frying_(food)", "emergency-car", "more than ten".
NAMES = st.from_regex(r"[A-Za-z][A-Za-z_ ,()'-]{0,24}[A-Za-z)]", fullmatch=True).filter(
    lambda name: (
        name == " ".join(name.split())
        and normalise(name) not in ("none", "and")
        and not name.lower().startswith("and ")
    )
)
OBJECTS = NAMES.filter(lambda name: " and " not in name and " is " not in name)
SECONDS = st.integers(0, 9)
SPANS = st.tuples(SECONDS, st.integers(1, 10)).map(sorted).filter(lambda span: span[0] < span[1])
REASONING = st.text(st.characters(exclude_characters="<>", exclude_categories=("Cs",)), max_size=80).map(str.strip)


def answer(name, reasoning, **label):
    """What the task's parser reads in a target as a model writes it."""
    return TASKS[name].parse(f"<s> {TASKS[name].target(**label, reasoning=reasoning)}</s><unk><unk>")


@given(NAMES, SPANS, REASONING)
def test_ave(event, span, reasoning):
    assert answer("ave", reasoning, event=event, start=span[0], end=span[1]) == {"event": event, "ranges": [span]}


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_ ]{0,20}[A-Za-z0-9]", fullmatch=True), REASONING)
def test_avqa(text, reasoning):
    assert answer("avqa", reasoning, answer=text) == text.strip()


EVENTS = st.lists(st.tuples(NAMES, SPANS).map(lambda e: [e[0], *e[1]]), max_size=5)


@given(EVENTS, EVENTS, REASONING)
def test_avvp(audio, visual, reasoning):
    parsed = answer("avvp", reasoning, audio=audio, visual=visual)
    assert {kind: sorted(events) for kind, events in parsed.items()} == {
        "audio": sorted(audio),
        "visual": sorted(visual),
    }


CORNERS = st.tuples(st.integers(0, 224), st.integers(0, 224)).map(sorted)


@given(OBJECTS, CORNERS, CORNERS, REASONING)
def test_arig(name, xs, ys, reasoning):
    box = (xs[0], ys[0], xs[1], ys[1])
    assert answer("arig", reasoning, object=name, box=box) == box


@given(st.sampled_from(["s4", "ms3", "avss"]), st.lists(OBJECTS, min_size=1, max_size=3), SECONDS, REASONING)
def test_segmentation(task, objects, second, reasoning):
    assert answer(task, reasoning, objects=objects, second=second) == {"objects": objects}


@given(
    st.text(st.characters(exclude_characters="<>\n", exclude_categories=("C", "Z")), min_size=1, max_size=40),
    st.one_of(OBJECTS, st.just("")),
    SECONDS,
    REASONING,
)
def test_ref_avs(expression, name, second, reasoning):
    parsed = answer("ref-avs", reasoning, expression=expression, object=name, second=second)
    assert parsed == {"objects": [name] if name else []}


@given(st.text(st.characters(exclude_characters="<>[]", exclude_categories=("Cs",)), max_size=80))
def test_avcap(caption):
    parsed = answer("avcap", "", caption=caption)
    assert parsed == (" ".join(caption.split()) if words(caption) else None)
