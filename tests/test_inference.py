"""Answers from what a model wrote, pieces of text as they come, and the cache of encoded clips."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import inference
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines.examples import Example


def test_the_cache_of_features_keeps_the_latest_and_no_more_than_its_bound(monkeypatch):
    encoded: list[int] = []

    def encode(model, params, frames, fbank, mesh):
        encoded.extend(int(frame[0]) for frame in frames[:1])  # the rest repeats it
        return jnp.asarray(frames, jnp.float32)[:, None]

    def clip(number: int) -> SimpleNamespace:
        return SimpleNamespace(frames=np.full((1, 2), number, np.uint8), fbank=np.zeros((1, 3), np.float32))

    monkeypatch.setattr(inference, "_encode", encode)
    monkeypatch.setattr(inference, "KEPT_BYTES", 3 * 8 + 7)  # three clips of two float32
    cache = inference.Encoder(None, {})
    for number in (1, 2, 3, 1, 4, 1, 3, 2):
        assert float(cache(clip(number))[0, 0, 0]) == number
        assert len(cache.kept) <= 3
    assert encoded == [1, 2, 3, 4, 2], "the one asked about least lately went"


@pytest.mark.parametrize(("together", "calls"), [(4, [4, 4]), (2, [2, 2, 2])])
def test_clips_are_encoded_a_few_at_a_time_and_each_once(monkeypatch, together, calls):
    """Six rows of five clips: each row gets the rows of its own clip, whatever it was encoded with."""
    sizes = []

    def encode(model, params, frames, fbank, mesh):
        sizes.append(len(frames))
        assert len(fbank) == len(frames)
        return jnp.asarray(frames, jnp.float32)[:, None] + jnp.asarray(fbank, jnp.float32)[:, None, :1]

    monkeypatch.setattr(inference, "_encode", encode)
    monkeypatch.setattr(inference, "ENCODED_TOGETHER", together)
    frames = np.array([[1, 0], [2, 0], [1, 0], [3, 0], [4, 0], [5, 0]], np.uint8)
    fbank = np.full((6, 3), 0.5, np.float32)
    cache = inference.Encoder(None, {})
    for _ in range(2):
        found = cache(SimpleNamespace(frames=frames, fbank=fbank))
        assert found[:, 0, 0].tolist() == [1.5, 2.5, 1.5, 3.5, 4.5, 5.5]
    assert sizes == calls


def test_the_clips_of_one_batch_are_kept_whatever_their_size(monkeypatch):
    monkeypatch.setattr(inference, "_encode", lambda model, params, frames, fbank, mesh: jnp.asarray(frames)[:, None])
    monkeypatch.setattr(inference, "KEPT_BYTES", 1)
    cache = inference.Encoder(None, {})
    clips = SimpleNamespace(frames=np.arange(6, dtype=np.uint8).reshape(3, 2), fbank=np.zeros((3, 1), np.float32))
    assert cache(clips)[:, 0].tolist() == clips.frames.tolist() and len(cache.kept) == 3


def test_clips_are_told_apart_by_picture_sound_and_shape():
    picture, sound = np.arange(6, dtype=np.uint8), np.zeros(4, np.float32)
    names = {
        inference._digest(*arrays)
        for arrays in (
            (picture, sound),
            (picture + 1, sound),
            (picture, sound + 1),
            (picture.reshape(2, 3), sound),
            (picture.reshape(3, 2), sound),
        )
    }
    assert len(names) == 5 and all(len(name) == 16 for name in names)
    assert inference._digest(picture[::-1], sound) == inference._digest(picture[::-1].copy(), sound)


def example(task: str, **fields) -> Example:
    return Example(id="x", task=task, instruction="?", **fields)


def test_an_answer_that_can_be_read_has_no_warning():
    text, mask = TASKS["avqa"].target("yes"), np.ones((2, 2), np.float32)
    answer = inference.read_answer(example("avqa"), text, None)
    assert (answer.text, answer.parsed, answer.mask, answer.warnings) == (text, "yes", None, ())
    assert answer.further_masks == () and answer.example.id == "x"
    shown = example("s4", mask_kind="binary")
    answer = inference.read_answer(shown, TASKS["s4"].target("dog"), mask)
    assert answer.parsed == {"objects": ["dog"]} and answer.mask is mask and answer.warnings == ()


@pytest.mark.parametrize(
    ("task", "text", "ended", "forced", "warning"),
    [
        ("avqa", "<answer> yes </answer>", False, False, "the answer did not end"),
        ("avqa", "who knows", True, False, "the text cannot be read as an answer to avqa"),
        ("s4", TASKS["s4"].target("dog"), True, False, "fewer than six mask tokens"),
        ("avqa", "<answer> yes </answer>", True, True, "the model wrote no mask tokens"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(task, text, ended, forced, warning):
    kind = TASKS[task].mask_kind
    (said,) = inference.read_answer(example(task, mask_kind=kind), text, None, ended, forced).warnings
    assert said.startswith(warning)


def test_an_answer_of_no_numbers_is_refused_and_what_was_not_finite_is_named():
    inference.check_finite(example("s4"), True, True)
    inference.check_finite(example("s4"), True)
    for logits, masks, field in ((True, False, "masks"), (False, True, "logits"), (False, False, "logits")):
        with pytest.raises(InputError, match=f"example 'x'.*the {field} of the model") as error:
            inference.check_finite(example("s4"), logits, masks)
        assert error.value.field == field


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")


def test_text_is_told_as_it_grows_in_whole_characters_and_by_row():
    heard: list[tuple[str, str]] = []
    clips = [example("avqa"), None, example("avcap")]
    tell = inference._teller(Bytes(), clips, lambda one, piece: heard.append((one.task, piece)))
    tokens = np.array([list("né!".encode()), list(b"fill"), list(b"dogs")])
    for lengths in ([2, 1, 0], [3, 2, 1], [3, 2, 1], [4, 4, 4]):
        tell(tokens, np.array(lengths))
    assert heard == [("avqa", "n"), ("avqa", "é"), ("avcap", "d"), ("avqa", "!"), ("avcap", "ogs")]


def test_masks_are_drawn_as_probabilities_and_classes_and_say_whether_they_are_numbers():
    """Three pictures of 1 x 2: the second has a binary logit that is none, the third a semantic one."""
    logits = jnp.array([[[0.0, 100.0]], [[0.0, jnp.nan]], [[-100.0, 0.0]]], jnp.bfloat16)
    classes = jnp.zeros((3, 4, 1, 2)).at[0, 3, 0, 1].set(2.0).at[1, 1, 0, 0].set(1.0).at[2, 2, 0, 0].set(jnp.inf)
    asked = []

    def apply(variables, states, pictures, method):
        asked.append((variables, states, pictures, method))
        return logits, classes

    drawn = inference.draw(SimpleNamespace(apply=apply), "weights", "states", "pictures")
    assert asked == [({"params": "weights"}, "states", "pictures", "masks")]
    assert drawn["binary"].dtype == jnp.float32 and drawn["semantic"].dtype == jnp.int32
    assert drawn["binary"][0].tolist() == [[0.5, 1.0]] and drawn["binary"][2].tolist() == [[0.0, 0.5]]
    assert drawn["semantic"].tolist() == [[[0, 3]], [[1, 0]], [[2, 0]]]
    assert drawn["finite"].tolist() == [True, False, False]
