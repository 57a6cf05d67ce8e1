"""The library: what a model says about files and about arrays, alone and together, and what goes on inside it."""

import subprocess
import sys
import time
from pathlib import Path

import clips
import jax
import numpy as np
import pytest

import crab_jax as cj
from crab_jax import api
from crab_jax.runs import run_params
from data_pipelines import media

SHORT = {"max_new_tokens": 24}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of ten seconds whose eighth second is loud."""
    return clips.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", clips.steady(10), clips.beep(10, 7.1, 7.9))


@pytest.fixture(scope="module")
def crab() -> cj.Crab:
    """The tiny model that comes with the package."""
    return cj.load("warm_start")


def test_importing_costs_nothing_and_names_are_typed_and_there():
    began = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, crab_jax as cj; assert 'jax' not in sys.modules; "
            "assert cj.__version__ and cj.tiny().llama.layers == 4",
        ],
        check=True,
    )
    assert time.monotonic() - began < 60
    for name in cj.__all__:
        assert getattr(cj, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = cj.nothing


def test_sizes_are_overridden_by_name_and_checked():
    assert cj.tiny(llama={"layers": 6}, lora={"heads": 5}).lora.heads == 5
    assert cj.crab_7b().llama.layers == 32
    for wrong, said in (
        ({"llama": {"layer": 6}}, r"sizes.llama.layer\]: is no size"),
        ({"lama": {}}, r"sizes.lama\]"),
        ({"llama": 3}, r"sizes.llama\]"),
        ({"llama": {"heads": 3}}, "does not divide"),
        ({"llama": {"heads": 0}}, "must be"),
        ({"llama": {"remat": "some"}}, "projections, offload, dots, none"),
    ):
        with pytest.raises(cj.InputError, match=said):
            cj.tiny(**wrong)


@pytest.mark.slow
def test_arrays_are_answered_like_the_file_that_they_are_of(crab, clip):
    frames, sound = media.read_video(clip, 10, 64), media.clip_sound(clip)
    file = cj.ask(clip, task="ms3", second=4)
    held = cj.ask(frames, seconds=10, audio=(sound, 16000), task="ms3", second=4)
    assert file.prompt == held.prompt and (file.picture.shape, held.picture.shape) == ((32, 32, 3), (64, 64, 3))
    both = crab.answer([held, file], batch_size=2, force_masks=True, **SHORT)
    alone = crab.answer(file, force_masks=True, **SHORT)
    assert both[0].text == both[1].text == alone.text
    (mask,), (again,) = both[1].masks, alone.masks
    assert mask.shape == (64, 64) and mask.dtype == np.float32
    np.testing.assert_allclose(mask, again, atol=1e-4)
    # The picture of a file is resized from its full size, that of these arrays was small already.
    assert np.abs(both[0].masks[0] - again).mean() < 0.1


@pytest.mark.slow
def test_text_comes_piece_by_piece_and_is_the_answer(crab, clip):
    asked = cj.ask(clip, task="ave")
    pieces = list(crab.stream(asked, **SHORT))
    answer = crab.answer(asked, **SHORT)
    assert len(pieces) > 1 and "".join(pieces) == answer.text
    with pytest.raises(cj.InputError):
        list(crab.stream(cj.ask(clip, task="ave"), temperature=0.5, top_p=float("nan"), **SHORT))


@pytest.mark.slow
def test_a_trace_names_tokens_slots_hidden_states_and_router_weights(crab, clip):
    asked = cj.ask(clip, task="avqa", question="How many instruments are there?")
    trace = crab.trace(asked)
    length, llama, heads = len(trace.tokens), crab.config.model.llama, crab.config.model.lora.heads
    assert trace.hidden.shape == (length, llama.hidden) and len(trace.pieces) == len(trace.slots) == length
    features = 10 * (crab.config.model.visual.queries + crab.config.model.audio.queries)
    assert sorted(trace.slots[trace.slots >= 0]) == list(range(features))
    assert "How many instruments are there?" in "".join(trace.pieces)
    for weights in trace.router.values():
        assert weights.shape == (llama.layers, length, heads)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    # The first token that is generated is the likeliest one after the last hidden state.
    logits = crab.module.apply({"params": crab.params}, trace.hidden[-1], method="logits")
    first = crab.tokenizer.decode([int(np.argmax(logits))], skip_special_tokens=False)
    assert crab.answer(asked, **SHORT).text.startswith(first.strip())
    behind = crab.trace(asked, answer="<answer> two </answer>")
    assert len(behind.tokens) > length
    np.testing.assert_allclose(behind.hidden[:length], trace.hidden, atol=1e-4)


def test_what_is_laid_out_for_generation_is_not_traced(crab, clip):
    laid_out = cj.load("warm_start", weights="int8")
    with pytest.raises(cj.InputError, match="'int8'.*load the model with weights="):
        laid_out.trace(cj.ask(clip, task="ave"))
    with pytest.raises(cj.InputError, match="weights.*int16"):
        cj.load("warm_start", weights="int16")


def test_a_model_of_sizes_alone_has_random_weights_of_its_seed():
    one, same, other = (cj.Crab(cj.tiny(llama={"layers": 1}, lora={"heads": 2}), seed=seed) for seed in (1, 1, 2))
    assert run_params.count(one.params) == run_params.count(other.params) and one.module.cfg.lora.heads == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, same.params))
    assert not jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


@pytest.mark.parametrize(
    ("media_of", "said"),
    [
        ({"video": np.zeros((4, 8, 8, 3), np.float32), "seconds": 10.0}, r"uint8\[frames, height, width, 3\]"),
        ({"video": np.zeros((4, 8, 8, 3), np.uint8)}, "seconds.*is missing"),
        ({"video": np.zeros((4, 8, 8, 3), np.uint8), "seconds": float("nan")}, "length of the clip"),
        ({"video": np.zeros((0, 8, 8, 3), np.uint8), "seconds": 10.0}, "uint8"),
        ({"image": np.zeros((8, 8), np.uint8), "audio": (np.zeros(99, np.float32), 16000)}, "uint8"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "audio": np.zeros(99, np.float32)}, "without a rate"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "audio": (np.zeros(99, np.int16), 16000)}, "divide by 32768"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "audio": (np.full(99, np.nan, np.float32), 16000)}, "NaN"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "audio": (np.full(99, 1e38, np.float32), 16000)}, "full scale"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "audio": (np.zeros(99, np.float32), 0)}, "audio"),
        ({"video": "nowhere.mp4"}, "nowhere.mp4"),
        ({}, "exactly one is needed"),
    ],
)
def test_arrays_of_another_form_are_refused(media_of, said):
    with pytest.raises(cj.InputError, match=said):
        cj.ask(**media_of, task="s4")


def test_a_sound_in_memory_is_mono_at_16_khz_and_in_step_with_its_pictures():
    frames, rate = np.zeros((20, 8, 8, 3), np.uint8), 44100
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(10 * rate) / rate).astype(np.float32)
    asked = cj.ask(frames, seconds=10, audio=(np.stack([tone, 0 * tone], 1), rate), task="ave")
    heard = asked.given.hear(asked.request.example.audio, asked.request.example.video).placed()
    assert len(heard) == 160000 and heard.dtype == np.float32 and np.abs(heard).max() == pytest.approx(0.15, abs=0.01)
    silent = cj.ask(frames, seconds=10, task="ave")
    assert silent.warnings == ("the video has no sound track; it is taken as silent",)
    assert cj.ask(frames, seconds=4, audio=(tone, rate), task="ave").warnings == (
        "the audio lasts 10.0 s, but the video 4.0 s: what is longer is cut off",
    )


def test_events_and_boxes_are_read_from_an_answer(clip):
    def events(task, parsed):
        asked = cj.ask(clip, task=task)
        return api._answer(asked, api.Prediction(asked.request.example, "", parsed)).events

    assert events("ave", {"event": "Bell", "ranges": [[1, 3]]}) == (cj.Event("Bell", 1, 3, "heard and seen"),)
    assert events("avvp", {"audio": [["Dog", 0, 2]], "visual": [["Car", 1, 4]]}) == (
        cj.Event("Dog", 0, 2, "heard"),
        cj.Event("Car", 1, 4, "seen"),
    )
    asked = cj.ask(clip, task="arig", second=3)
    example = asked.request.example
    answer = api._answer(asked, api.Prediction(example, "", (0.0, 0.0, 112.0, 224.0)))
    height, width = asked.picture.shape[:2]
    assert answer.boxes == (cj.Box(0, 0, width // 2, height),)
