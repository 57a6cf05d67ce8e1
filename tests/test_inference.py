"""Answers from what a model wrote, pieces of text as they come, and what is kept of clips."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crab_jax as cj
from crab_jax import inference
from crab_jax.api import ASKED
from crab_jax.generate import Generation
from crab_jax.io.errors import InputError
from crab_jax.parallel import sharding
from crab_jax.tasks import TASKS
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example
from data_pipelines.given import Given


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
    """A tokenizer whose tokens are bytes; 0 ends a text."""

    eos_id, pad_id, mask_ids = 0, 0, range(1, 7)

    def decode(self, tokens) -> str:
        return bytes(tokens.tolist()).partition(b"\0")[0].decode(errors="replace")


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


def test_clips_are_encoded_without_a_mesh_and_every_copy_of_the_model_gets_all_rows():
    class Model:
        def apply(self, variables, frames, fbank, method):
            assert method == "features"
            return frames * variables["params"] + fbank

    frames, fbank, mesh = jnp.ones((4, 1, 2)), jnp.full((4, 1, 2), 0.5), sharding.make_mesh(devices=jax.devices()[:1])
    for on in (None, mesh):
        rows = inference._encode(Model(), 2.0, frames, fbank, on)
        assert (rows == 2.5).all() and (on is None or rows.sharding == sharding.replicated(mesh))


@pytest.fixture
def answering(monkeypatch):
    """A function (examples, batches of them, GenerateOptions) -> (Predictions, the calls of the compiled programs).

    Every row says "ok" and writes mask tokens; the masks of a picture are 0.5 and of class 3.
    """
    calls = {"answer": [], "draw": 0}

    def answer(model, params, prompts, options, rng, features, mesh):
        rows = len(prompts.index)
        calls["answer"].append((prompts, options, rng))
        tokens = jnp.tile(jnp.array([*b"ok", 0], jnp.int32), (rows, 1))
        yes = jnp.ones(rows, bool)
        return Generation(tokens, jnp.full(rows, 2), jnp.zeros((rows, 1, 6, 2)), yes[:, None], ~yes, yes)

    def draw(model, params, states, pictures, mesh):
        calls["draw"] += 1
        shape = pictures.shape[:3]
        return {"binary": jnp.full(shape, 0.5), "semantic": jnp.full(shape, 3), "finite": jnp.ones(shape[0], bool)}

    monkeypatch.setattr(inference, "_encode", lambda model, params, frames, fbank, mesh: jnp.zeros((len(frames), 1, 2)))
    monkeypatch.setattr(inference, "_answer", answer)
    monkeypatch.setattr(inference, "_draw", draw)

    def run(examples, batches, **decoding):
        monkeypatch.setattr(inference, "eval_batches", lambda *_, **__: ((None, batch) for batch in batches))
        found = inference.predict_examples(None, {}, None, Bytes(), examples, "", 4, 7, seed=5, decoding=decoding)
        return list(found), calls

    return run


def batch_of(indices, masks=0):
    empty = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=masks), len(indices), 8)
    return empty.replace(index=np.array(indices, np.int32))


def test_masks_are_drawn_and_appended_where_there_is_a_picture(answering):
    examples = [example("avqa"), example("s4", mask_kind="binary"), example("avss", mask_kind="semantic")]
    found, calls = answering(examples, [batch_of([0, -1]), batch_of([1, 2, -1], masks=1)], force_masks=True)
    assert [answer.text for answer in found] == ["ok"] * 3 and calls["draw"] == 1
    assert found[0].mask is None and (found[1].mask == 0.5).all() and (found[2].mask == 3).all()
    unread = "the text cannot be read as an answer to "
    assert [answer.warnings for answer in found] == [(unread + name,) for name in ("avqa", "s4", "avss")]
    assert [options.force_masks for _, options, _ in calls["answer"]] == [False, True]
    assert all(prompts.frames is prompts.fbank is None for prompts, _, _ in calls["answer"]), "features are enough"
    assert [prompts.index.tolist() for prompts, _, _ in calls["answer"]] == [[0, -1], [1, 2, -1]]
    assert all(rng is None for _, _, rng in calls["answer"])


def test_what_an_example_draws_follows_from_the_seed_and_its_id(answering):
    """By 31 bits of the CRC-32 of the id: the same in every batch, list and version."""
    examples = [Example(id=name, task="avqa", instruction="?") for name in ("123456789", "a")]
    _, calls = answering(examples, [batch_of([1, -1, 0])], temperature=0.7)
    ((prompts, options, rng),) = calls["answer"]
    assert prompts.index.tolist() == [0xE8B7BE43 >> 1, -1, 0xCBF43926 >> 1] and prompts.index.dtype == np.int32
    assert options.temperature == 0.7 and (rng == jax.random.key(5)).all()


@pytest.fixture(scope="module")
def asked():
    """(model that comes with the package, three questions about each of two clips and a mask, their media)."""
    rng, asks, examples = np.random.default_rng(0), [], []
    sound = (0.1 * rng.normal(size=16000 * 10).clip(-1, 1).astype(np.float32), 16000)
    for number in range(2):
        frames = rng.integers(0, 256, (10, 48, 48, 3), dtype=np.uint8)
        about = functools.partial(cj.ask, frames, audio=sound, seconds=10.0)
        asks += [about(task="avqa", question="is it 0"), about(task="s4", second=3)]
        first = asks[-2].request.example
        for question in range(3):
            instruction = first.instruction.replace("is it 0", f"is it {question}")
            examples.append(dataclasses.replace(first, id=f"{number} {question}", instruction=instruction))
        examples.append(asks[-1].request.example)
    return cj.load("warm_start"), examples[::-1], Given.together([ask.given for ask in asks])


@pytest.mark.parametrize("layout", ["training", "generation"])
def test_what_the_prompts_about_a_clip_have_in_common_is_read_once(asked, monkeypatch, layout):
    """Tokens, masks and states are those of whole prompts, whose beginnings are read twice: once for each clip."""
    crab, examples, given = asked
    model, params = (crab.module, crab.params) if layout == "training" else crab.module.for_generation(crab.params)
    begin, streamed, answered = inference.Prefixes.__call__, inference.stream, inference._answer

    def predict(reuse):
        read, generations = [], []

        def counted(self, prompts, *arguments):
            begun = begin(self, prompts, *arguments) if reuse else None
            read.append((self.positions, prompts.tokens.shape[1]))
            return begun

        def noted(generate):
            return lambda *arguments, **options: generations.append(generate(*arguments, **options)) or generations[-1]

        monkeypatch.setattr(inference.Prefixes, "__call__", counted)
        monkeypatch.setattr(inference, "stream", noted(streamed))
        monkeypatch.setattr(inference, "_answer", noted(answered))
        found = inference.predict_examples(
            model, params, crab.config, crab.tokenizer, examples, given, 2, 12, decoding={"force_masks": True}, **ASKED
        )
        return {one.example.id: one for one in found}, generations, read

    (ours, generations, read), (wanted, whole, _) = predict(True), predict(False)
    beginning, rest = 2 * inference.PREFIX, inference.SHORTEST_REST
    assert [positions for positions, _ in read] == [
        beginning + 2 * rest,
        2 * (beginning + 2 * rest),
        2 * beginning + 6 * rest,
    ]
    assert read[-1][0] < 0.6 * 6 * read[-1][1]
    assert ours.keys() == wanted.keys() and len(ours) == 8
    for name, one in ours.items():
        assert one.text == wanted[name].text
        assert (one.mask is None) == (wanted[name].mask is None) == (one.example.task != "s4")
        if one.mask is not None:
            np.testing.assert_array_equal(one.mask > 0.5, wanted[name].mask > 0.5)
    for found, other in zip(generations, whole, strict=True):
        np.testing.assert_array_equal(found.tokens, other.tokens)
        np.testing.assert_allclose(found.mask_states, other.mask_states, atol=1e-5)


@pytest.mark.parametrize("bound", [0, 10**9])
def test_beginnings_are_kept_within_a_bound_and_always_the_latest(monkeypatch, bound):
    """Prompts of two clips, one of whose beginnings is asked about again; those without media are not begun."""
    read = []

    class Cached:
        def empty_cache(self, rows, slots):
            return jnp.full((rows, slots), -1)

        def admitted(self, cache, others, rows):
            taken = jnp.where((rows >= 0)[:, None], others[jnp.maximum(rows, 0)], cache[:, : others.shape[1]])
            return cache.at[:, : others.shape[1]].set(taken)

    def fake(model, params, prompts, features, mesh):
        read.append(prompts.tokens[0].tolist())
        return jnp.asarray(prompts.tokens)

    monkeypatch.setattr(inference, "_read", fake)
    monkeypatch.setattr(inference, "KEPT_BYTES", bound)
    monkeypatch.setattr(inference, "PREFIX", 2)
    tokens = np.array([[5, 1, 1, 8, 0], [5, 2, 2, 9, 9], [5, 1, 1, 7, 7]])
    slots = np.where((tokens == 1) | (tokens == 2), 0, -1)
    fields = dict.fromkeys(inference.BATCH_FIELDS)
    prompts = inference.Batch(
        **fields | {"tokens": tokens, "slots": slots, "text_mask": tokens > 0, "index": tokens[:, 0]}
    )
    begin, names = inference.Prefixes(Cached(), {}), [b"one", b"two", b"one"]
    for _ in range(2):
        begun = begin(prompts, names, np.zeros((3, 1, 2)), 4)
        assert begun.lengths.tolist() == [3, 3, 3] and begun.width == 5
        assert begun.cache[:, :4].tolist() == [[5, 1, 1, 8], [5, 2, 2, 9], [5, 1, 1, 8]] and begun.cache.shape == (3, 9)
        assert len(begin.kept) == (2 if bound else 1)
    assert len(read) == (2 if bound else 4)
    text = dataclasses.replace(prompts, slots=np.full((3, 5), -1))
    assert begin(text, names, np.zeros((3, 1, 2)), 4) is None and len(read) == (2 if bound else 4)


def test_clips_with_the_same_media_and_windows_are_one():
    base = example("avqa", video="a.mp4", windows="ten", second=3)
    assert inference.clip_of(base) == inference.clip_of(dataclasses.replace(base, id="y", instruction="!", second=4))
    for changes in ({"video": "b.mp4"}, {"windows": "one"}, {"audio": "a.wav"}, {"image": "a.png"}):
        assert inference.clip_of(base) != inference.clip_of(dataclasses.replace(base, **changes))
    one = dataclasses.replace(base, windows="one")
    assert inference.clip_of(one) != inference.clip_of(dataclasses.replace(one, second=4))
