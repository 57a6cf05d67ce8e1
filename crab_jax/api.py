"""The library: load a model, ask it about a clip, look inside it.

import crab_jax as cj

crab = cj.load("runs/x")
answer = crab.answer(cj.ask("clip.mp4", task="ms3", second=4))
trace = crab.trace(cj.ask("clip.mp4", task="avqa", question="How many instruments are there?"))
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax import defaults
from crab_jax.config import RunConfig, derived_data, resolve
from crab_jax.inference import Prediction, predict_examples
from crab_jax.io import packaged
from crab_jax.io.errors import InputError
from crab_jax.models.crab import CrabConfig
from crab_jax.models.generating import KINDS
from crab_jax.models.protocol import Model
from crab_jax.models.quirks import PRESETS
from crab_jax.questions import Request, request
from crab_jax.runs import run_folder, run_mesh, run_params
from crab_jax.tasks import TASKS, use_tasks
from crab_jax.tasks.task import Event, Task
from crab_jax.visualize.overlay import scale_box
from data_pipelines import batching
from data_pipelines.decoded import Root
from data_pipelines.examples import Example
from data_pipelines.given import Given
from data_pipelines.tokens import Tokenizer

_numbers = itertools.count()
# Settings for reading a user's media, which do not depend on the training of the model: short sounds are padded with
# silence, and seconds count as in a media player.
ASKED: Mapping[str, Any] = {"pad_short_audio": True, "clock": "shown"}


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked question about media, made by `ask`.

    task: name of the task, "question" for a question without a task's prompt. prompt: the text that the model reads.
    picture: uint8[H,W,3], the picture that the question is about, before it is resized for the model; None for a
    question about a clip. warnings: notes on unusual media, such as a silent sound track.
    """

    request: Request
    given: Given

    @property
    def task(self) -> str:
        """Name of the task, "question" for a question without a task's prompt."""
        return self.request.task

    @property
    def prompt(self) -> str:
        """The text that the model reads, with placeholders for pictures and sound."""
        return self.request.example.instruction

    @property
    def picture(self) -> np.ndarray | None:
        """The picture that the question is about, uint8[H,W,3]; None for a question about a clip."""
        return None if self.request.picture is None else self.given.picture(self.request.picture)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Notes on unusual media, such as a silent sound track."""
        return self.request.warnings


def ask(
    video: str | Path | np.ndarray | None = None,
    *,
    image: str | Path | np.ndarray | None = None,
    audio: str | Path | tuple[np.ndarray, int] | None = None,
    seconds: float | None = None,
    task: str | Task = "",
    question: str = "",
    expression: str = "",
    second: int | None = None,
    windows: str = "",
    prompt_variant: str = "",
) -> Ask:
    """Return a question about a clip, or about a picture with its sound.

    video: a file, or frames uint8[T,H,W,3] in RGB, evenly spaced over `seconds`. image: a file, or uint8[H,W,3].
    audio: a file, or (samples, rate): float32[N] or float32[N, channels] between -1 and 1, and samples per second; by
    default the video's own track. task: one of the nine, or a Task of your own; "" puts the `question` to the model
    without a task's prompt. expression: for ref-avs, the object to segment, in words. second: the tenth of the clip
    (fifth of a short one) that the question is about, by default the loudest. windows, prompt_variant: as in
    `python -m crab_jax.predict --help`.

    Raises InputError for an unknown task, a missing or superfluous argument, and for media that are missing, damaged or
    of another shape.
    """
    if isinstance(task, Task):
        use_tasks([task], "ask")
        task = task.name
    record: dict[str, Any] = {}
    given, number = Given(), next(_numbers)  # names differ, because several questions may be answered in one batch
    if isinstance(video, np.ndarray):
        if seconds is None:
            raise InputError("ask", "seconds", "is missing", "give the length of the clip in seconds")
        record["video_path"] = given.add_clip(f"video {number}", video, seconds)
    elif video is not None:
        record["video_path"] = str(video)
    if isinstance(image, np.ndarray):
        record["image_path"] = given.add_picture(f"image {number}", image)
    elif image is not None:
        record["image_path"] = str(image)
    if isinstance(audio, tuple):
        record["audio_path"] = given.add_sound(f"sound {number}", *audio)
    elif isinstance(audio, np.ndarray):
        raise InputError("ask", "audio", "is samples without a rate", "give (samples, rate)")
    elif audio is not None:
        record["audio_path"] = str(audio)
    texts = {
        "task": task,
        "question": question,
        "expression": expression,
        "windows": windows,
        "prompt_variant": prompt_variant,
    }
    record |= {name: value for name, value in texts.items() if value}
    if second is not None:
        record["second"] = second
    return Ask(request(record, "ask", f"{number}_{task or 'question'}", given), given)


class Box(NamedTuple):
    """A box in pixels of the picture that was asked about: its left, top, right and bottom edge."""

    left: float
    top: float
    right: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a model.

    text: as written, without special tokens. parsed: the result of the task's parser, or None. masks: at the model's
    picture size, float32[H,W] probabilities, or int32[H,W] class ids for avss. events: for ave and avvp. boxes: for
    arig. warnings: notes on unusual media and on parts that the answer lacks.
    """

    text: str
    parsed: Any
    masks: tuple[np.ndarray, ...]
    events: tuple[Event, ...]
    boxes: tuple[Box, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Internal values of the model at the L positions of a prompt, and of the answer where one was given.

    tokens: int32[L] ids, placeholders expanded. slots: int32[L], the row of the features (visual ones first) that is
    placed at each position, -1 for text. hidden: float32[L,D] after the last layer and norm. router: {projection:
    float32[layers,L,heads]}, the weights with which each token mixes the LoRA heads. pieces: the text of each token,
    "" for a feature.
    """

    tokens: np.ndarray
    slots: np.ndarray
    hidden: np.ndarray
    router: Mapping[str, np.ndarray]
    pieces: tuple[str, ...]


class _AnswerOptions(TypedDict, total=False):
    """The options of `Crab.answer`, which describes them."""

    batch_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    force_masks: bool
    mask_groups: int
    on_text: Callable[[Ask, str], None] | None


class Crab:
    """A model that answers questions: `module` (Flax), `params`, `config` (RunConfig) and `tokenizer`.

    `load` makes one from a checkpoint, and `Crab(tiny())` makes one from sizes, with random weights drawn from `seed`.
    In the training layout it can answer and trace; in the layout for generation (`load(..., weights="float")`) it can
    only answer.
    """

    def __init__(
        self, config: CrabConfig | RunConfig, params: Any = None, tokenizer: Tokenizer | None = None, seed: int = 0
    ):
        if isinstance(config, CrabConfig):
            base = resolve(defaults.tiny())
            fields = derived_data(config, PRESETS[base.compat])
            config = dataclasses.replace(
                base, model=config, seed=seed, data=dataclasses.replace(base.data, **fields, lengths=_lengths(config))
            )
        self.config = config
        self.module: Model = config.model.build()
        self.tokenizer = tokenizer or Tokenizer.load(packaged.TOKENIZER)
        if self.tokenizer.vocab_size > config.model.llama.vocab_size:
            raise InputError(
                "Crab",
                "tokenizer",
                f"has {self.tokenizer.vocab_size} tokens, and the model {config.model.llama.vocab_size} rows",
                "give the model's tokenizer",
            )
        self.params = run_params.initial_params(config, self.module) if params is None else params
        self.mesh: jax.sharding.Mesh | None = None  # the devices of a model in the layout for generation

    @overload
    def answer(self, asked: Ask, **options: Unpack[_AnswerOptions]) -> Answer: ...

    @overload
    def answer(self, asked: Sequence[Ask], **options: Unpack[_AnswerOptions]) -> list[Answer]: ...

    def answer(
        self,
        asked: Ask | Sequence[Ask],
        *,
        batch_size: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        force_masks: bool = False,
        mask_groups: int = 1,
        on_text: Callable[[Ask, str], None] | None = None,
    ) -> Answer | list[Answer]:
        """Return the answer to one question, or those to several, in their order.

        temperature: 0 is greedy. force_masks: append the mask tokens where the model wrote none. mask_groups: draw a
        mask for each of the last `mask_groups` groups of mask tokens. on_text: called with each piece of text as it is
        written. Raises InputError for media that cannot be decoded, and for logits or masks that are not finite.
        """
        questions = [asked] if isinstance(asked, Ask) else list(asked)
        by_id = {question.request.example.id: question for question in questions}
        tell = None if on_text is None else (lambda example, text: on_text(by_id[example.id], text))
        decoding = {"temperature": temperature, "top_p": top_p, "force_masks": force_masks, "mask_groups": mask_groups}
        answered: dict[str, Answer] = {}
        given = Given.together([question.given for question in questions])
        for prediction in self.predict(
            [question.request.example for question in by_id.values()],
            given,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            decoding=decoding,
            on_text=tell,
            **ASKED,
        ):
            answered[prediction.example.id] = _answer(by_id[prediction.example.id], prediction)
        answers = [answered[question.request.example.id] for question in questions]
        return answers[0] if isinstance(asked, Ask) else answers

    def predict(
        self,
        examples: Sequence[Example],
        root: Root,
        *,
        batch_size: int = 1,
        max_new_tokens: int = 256,
        seed: int = 0,
        decoding: Mapping[str, Any] | None = None,
        on_text: Callable[[Example, str], None] | None = None,
        **data_changes: Any,
    ) -> Iterator[Prediction]:
        """Yield the predictions of Examples of a data root, in the order of their batches.

        root: a folder, raw or prepared, or a `Given`. decoding: fields of GenerateOptions. data_changes: fields of the
        DataConfig that differ from those of training. Raises InputError for a file that cannot be decoded, because a
        score without that Example would have another meaning.
        """
        return predict_examples(
            self.module,
            self.params,
            self.config,
            self.tokenizer,
            examples,
            root,
            batch_size,
            max_new_tokens,
            seed=seed,
            decoding=decoding,
            on_text=on_text,
            mesh=self.mesh,
            on_error="raise",
            **data_changes,
        )

    def stream(self, asked: Ask, **options: Any) -> Iterator[str]:
        """Yield the text of an answer piece by piece while it is written; `options` are those of `answer`."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                self.answer(asked, on_text=lambda _, text: pieces.put(text), **options)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        threading.Thread(target=work, daemon=True, name="answer").start()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def trace(self, asked: Ask, answer: str | None = None) -> Trace:
        """Return the internal values of the model for the prompt, followed by `answer` where it is given.

        Raises InputError for a model in the layout for generation, which does not return router weights.
        """
        if weights := getattr(self.module, "weights", ""):
            problem = f"are in the layout for generation ({weights!r}), which returns no router weights"
            raise InputError("trace", "weights", problem, 'load the model with weights=""')
        example = asked.request.example
        if answer is not None:
            example = dataclasses.replace(example, target=answer)
        # The mask decoder runs after the language model, so the trace does not depend on it.
        example = dataclasses.replace(example, mask_kind="none", mask=None)
        data = dataclasses.replace(
            self.config.data, prompt_only=answer is None, cache_dir="", **ASKED, tasks=tuple(TASKS)
        )
        row = batching.load(example, asked.given, self.tokenizer, data)
        hidden, router = _look(self.module, self.params, jax.tree.map(jnp.asarray, batching.collate([row], 1)))
        length = int(row["text_mask"].sum())
        tokens, slots = row["tokens"][:length], row["slots"][:length]
        pieces = tuple(
            "" if slot >= 0 else self.tokenizer.decode([token], skip_special_tokens=False)
            for token, slot in zip(tokens, slots, strict=True)
        )
        weights = {path: np.asarray(value[:, 0, :length], np.float32) for path, value in router.items()}
        return Trace(tokens, slots, np.asarray(hidden[0, :length], np.float32), weights, pieces)


def load(
    checkpoint: str | Path, weights: str = "", tasks: Sequence[Task | str] = (), batch_size: int = 1, tensor: int = 0
) -> Crab:
    """Load the model of a run, a packed or an imported model; "warm_start" is the tiny one of this package.

    weights: "" keeps the training layout; "float", "int8" and "int4" choose the layout for generation, which is faster
    but cannot be traced. tasks: tasks of your own that the model was trained with, or the modules that hold them
    ("package.module:NAME"); modules that the checkpoint names are never imported. batch_size, tensor: with `weights`,
    the model is copied to as many of this process's devices as divide the batch, and each copy is split over `tensor`
    of them (0 = as few as it fits on).

    Raises InputError for a folder of another kind, for damaged files, and for a task whose name another task has.
    """
    run_folder.use_tasks_of(tasks, checkpoint)
    if weights not in ("", *KINDS):
        raise InputError("load", "weights", f"is {weights!r}", f"use one of {', '.join(map(repr, ('', *KINDS)))}")
    mesh = run_mesh.serving_mesh(run_folder.load_config(checkpoint), weights, batch_size, tensor) if weights else None
    module, params, config, tokenizer = run_params.load_model(checkpoint, weights, mesh)
    crab = Crab(config, params, tokenizer)
    crab.module, crab.mesh = module, mesh
    return crab


@partial(jax.jit, static_argnames="module")
def _look(module: Model, params: Any, batch: batching.Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return (hidden states [1,L,D], {projection: router weights [layers,1,L,heads]}) of a batch of one row."""
    output: Any
    output, sown = module.apply({"params": params}, batch, mutable=["router"])
    weights = traverse_util.flatten_dict(sown["router"])
    return output.hidden, {path[-2]: value[0] for path, value in weights.items()}


def _lengths(cfg: CrabConfig) -> tuple[int, ...]:
    """Return bucket lengths that hold ten frames and windows of a model of these sizes, and text around them."""
    features = 10 * (cfg.visual.queries + cfg.audio.queries)
    return tuple(features + text for text in (96, 160, 256, 512))


def _answer(asked: Ask, prediction: Prediction) -> Answer:
    task, parsed = TASKS[prediction.example.task], prediction.parsed
    masks = () if prediction.mask is None else (prediction.mask, *prediction.further_masks)
    events: tuple[Event, ...] = ()
    boxes: tuple[Box, ...] = ()
    if task.answer == "events" and parsed is not None:
        events = tuple(task.events(parsed))
    if task.answer == "box" and parsed is not None and asked.picture is not None and (box := task.box(parsed)):
        height, width = asked.picture.shape[:2]
        boxes = (Box(*map(float, scale_box(box, (width, height)))),)
    return Answer(prediction.text, parsed, masks, events, boxes, (*asked.warnings, *prediction.warnings))
