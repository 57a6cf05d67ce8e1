"""Evaluation during training: losses of held-out Examples, and answers to them, on the mesh of the run.

It reads the parameters between two steps and writes only its own records. Training is the same with it and without,
because it draws no random numbers, has its own data, and donates no buffer.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crab_jax import losses, optim
from crab_jax.config import RunConfig
from crab_jax.evaluation import scoring
from crab_jax.evaluation.judging import check_labels
from crab_jax.generate import GenerateOptions, generate
from crab_jax.inference import draw
from crab_jax.io.errors import InputError
from crab_jax.losses import LossConfig, Term
from crab_jax.models.protocol import Model
from crab_jax.parallel import distributed, sharding
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.runs import run_data, run_folder
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import sample_metric
from crab_jax.training.train_step import loss_rows
from data_pipelines import mixture
from data_pipelines.batching import Batch, Bucket
from data_pipelines.bucket_fill import Group
from data_pipelines.examples import Example, spread
from data_pipelines.several import OneRoot, Several, by_root
from data_pipelines.tokens import EOS, Tokenizer

SAMPLES = "samples"  # key beside the loss terms: the number of Examples that were counted
TOKENS = 32  # the largest number of tokens of an answer is a multiple of this
TERMS = ("text", "bce", "dice", "ce")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The Examples that a run is evaluated on during training, and at which steps.

    groups: the examples of each bucket. every: steps between evaluations. steps: length of the run.
    split: the split that the Examples come from. tasks: the tasks that the run trains on.
    """

    examples: Sequence[Example]
    groups: Mapping[Bucket, Group]
    every: int
    steps: int
    split: str
    tasks: Sequence[str]

    def due(self, step: int) -> bool:
        """Return whether the run is evaluated after `step`: at step 0, after every `every` steps, and at the end."""
        return step % self.every == 0 or step == self.steps

    def described(self) -> str:
        """Return a line that says what is evaluated, and when."""
        counts = Counter(self.examples[index].task for group in self.groups.values() for index in group)
        shown = ", ".join(f"{counts[task]} of {task}" for task in self.tasks if counts[task])
        lacking = ", ".join(task for task in self.tasks if not counts[task])
        none = f"; none of {lacking}" if lacking else ""
        return f"evaluation every {self.every} steps on examples of {self.split}: {shown}{none}"


def held_out(config: RunConfig, tokenizer: Tokenizer) -> HeldOut | None:
    """Return the Examples that a run is evaluated on, or None when it is not evaluated.

    They are up to `eval_samples` Examples of each of its tasks, evenly spread over the split, the same in every process
    and for every seed. Examples without an answer have no loss and are left out. Only annotations are read. Raises
    InputError when the split does not exist or has no such Example, and, unless data.on_error is "skip", for an Example
    that cannot be batched or scored.
    """
    if not config.eval_every:
        return None
    drawn, fix = config.mixture, "name a split of the data with --config.eval_split, or give --config.eval_every=0"
    usable: list[Example] = []
    root_of: dict[int, str] = {}  # id of the object -> its data root
    failed: list[InputError] = []
    for root in drawn.places:
        try:
            annotated = run_data.read_examples(
                root,
                config.eval_split,
                datasets=drawn.datasets,
                variant=drawn.variant,
                frames="all",
                missing=config.data.on_error,
                malformed=config.data.on_error,
            )
        except InputError as error:
            failed.append(error)
            continue
        usable += [e for e in annotated if drawn.weights[e.task] > 0 and e.target and (e.mask or e.mask_kind == "none")]
        root_of |= {id(example): root for example in annotated}
    if len(failed) == len(drawn.places):
        problem = f"is {config.eval_split!r}, which cannot be read: {failed[0]}"
        raise InputError("--config", "eval_split", problem, fix)
    for why in failed:
        run_folder.log.warning("not among the held-out examples: %s", why)
    if not usable:
        problem = f"is {config.eval_split!r}, which has no example with an answer of any task that the run trains on"
        raise InputError("--config", "eval_split", problem, fix)
    examples: Sequence[Example] = spread(usable, config.eval_samples)
    if drawn.places[1:]:
        of_root = {root: [e for e in examples if root_of[id(e)] == root] for root in drawn.places}
        examples = Several([OneRoot(root, found, run_data.own_frames(root)) for root, found in of_root.items()])
    for part in by_root(examples):
        run_data.check_tenths(part.frames or config.data.video_frames, part.examples)
    check = (lambda example: check_labels([example])) if config.eval_answers else lambda example: None
    groups = mixture.group_by_bucket(examples, tokenizer, config.data, check=check)
    tasks = [task for task in TASKS if drawn.weights[task] > 0]
    return HeldOut(examples, groups, config.eval_every, config.steps, config.eval_split, tasks)


def held_out_sums(model: Model, trainable: Any, frozen: Any, batch: Batch) -> dict[str, Term]:
    """Return the sums and counts, float32[tasks] each, of every loss term of training, without dropout.

    The terms are "text" and, in a bucket with masks, "bce", "dice" and "ce". Under SAMPLES both the sum and the count
    are the number of Examples.
    """
    output: Any = model.apply({"params": optim.merge(trainable, frozen)}, batch)
    counted = (batch.index >= 0).astype(jnp.float32)
    rows = loss_rows(output, batch) | {SAMPLES: Term(counted, counted)}

    def by_task(term: Term) -> Term:
        groups = len(term.sum) // len(batch.task)  # mask groups per row
        return losses.by_task(term, jnp.repeat(batch.task, groups), len(TASKS))

    return {name: by_task(term) for name, term in rows.items()}


def held_out_answers(
    model: Model, trainable: Any, frozen: Any, batch: Batch, options: GenerateOptions
) -> dict[str, jax.Array]:
    """Return greedy answers to the prompts of a batch whose rows also hold the true answers, which are removed.

    The result has "tokens" int32[B,N] and "index" int32[B]. In a bucket with masks it also has "binary", "semantic" and
    "finite" (see `inference.draw`), "has_mask" bool[B], and the true masks "truth" int32[B,H,W].
    """
    params = optim.merge(trainable, frozen)
    answer = jnp.argmax(batch.loss_mask, axis=1)[:, None]  # first position of the answer
    prompt = batch.text_mask & (jnp.arange(batch.tokens.shape[1]) < answer)
    asked = dataclasses.replace(
        batch,
        tokens=jnp.where(prompt, batch.tokens, options.pad_id),
        slots=jnp.where(prompt, batch.slots, -1),
        text_mask=prompt,
    )
    generation = generate(model, params, asked, options)
    answers = {"tokens": generation.tokens, "index": batch.index}
    if batch.seg_frame.shape[1]:
        answers |= draw(model, params, generation.mask_states[:, 0], batch.seg_frame[:, 0])
        answers |= {"has_mask": generation.has_mask[:, 0], "truth": batch.seg_target[:, 0]}
    return answers


def loss_record(sums: Mapping[str, tuple[np.ndarray, np.ndarray]], cfg: LossConfig) -> dict[str, float]:
    """Return the losses of an evaluation by name, from sums and counts float64[tasks] of each term.

    `eval/loss` is the loss of all Examples as one batch. The others are `eval/loss/<term>`, `eval/loss/<term>/<task>`
    and `eval/samples`; those whose count is 0 are left out.
    """
    pooled = {name: Term(jnp.float32(total.sum()), jnp.float32(number.sum())) for name, (total, number) in sums.items()}
    terms = {name: pooled[name] for name in TERMS if name in pooled}
    record = {"eval/loss": float(losses.total(terms, cfg)), "eval/samples": float(pooled[SAMPLES].sum)}
    for name in terms:
        total, number = sums[name]
        if number.sum():
            record[f"eval/loss/{name}"] = float(total.sum() / number.sum())
        record |= {
            f"eval/loss/{name}/{task}": float(total[place] / number[place])
            for place, task in enumerate(TASKS)
            if number[place]
        }
    return record


def answer_record(
    answers: Sequence[Mapping[str, np.ndarray]], examples: Sequence[Example], tokenizer: Tokenizer
) -> dict[str, float]:
    """Return `eval/<metric>/<task>` for the metric that ranks samples of each task, from answers to `examples`."""
    judged = []
    for batch in answers:
        for row in np.flatnonzero(batch["index"] >= 0):
            example = examples[batch["index"][row]]
            drew = example.mask_kind != "none" and bool(batch["has_mask"][row])
            answer = scoring.Answer(
                example.id, tokenizer.decode(batch["tokens"][row]), batch[example.mask_kind][row] if drew else None
            )
            truth = batch["truth"][row] if example.mask_kind != "none" else None
            judged.append(scoring.judge(example, answer, truth))
    record = {}
    for name, of_task in scoring.by_task(judged).items():
        metric = sample_metric(TASKS[name])
        value = TASKS[name].reduce([answer.stats for answer in of_task]).get(metric, np.nan)
        if np.isfinite(value):
            record[f"eval/{metric}/{name}"] = float(value)
    return record


class Evaluation:
    """Evaluation of a run: the decoded held-out Examples, and programs for their losses and answers.

    Examples are decoded once and kept on the host, about 3 MB each. Each program is compiled once per bucket.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        mesh: Mesh,
        tokenizer: Tokenizer,
        chosen: HeldOut,
        trainable: Any,
        micro_batches: int,
    ):
        self.config, self.tokenizer, self.chosen, self.examples = config, tokenizer, chosen, chosen.examples
        self.batch_at = sharding.batch_sharding(mesh)
        self.rows = _batch_rows(config.mixture.batch_size // micro_batches, mesh, chosen)
        self.batches = mixture.answered_batches(
            chosen.examples,
            chosen.groups,
            config.mixture.places[0],
            tokenizer,
            config.data,
            self.rows,
            distributed.own_rows(self.batch_at, self.rows),
        )
        longest = max(len(tokenizer.ids(example.target + EOS)) for example in chosen.examples)
        options = GenerateOptions(
            tokenizer.eos_id, tokenizer.pad_id, tuple(tokenizer.mask_ids), TOKENS * (longest // TOKENS + 1)
        )

        def compiled(program: Any) -> Any:
            def run(trainable: Any, frozen: Any, batch: Batch) -> Any:
                with sharding.constrained(mesh):
                    return program(model, trainable, frozen, batch)

            shardings = (jax.tree.map(lambda x: x.sharding, trainable), None, self.batch_at)
            return jax.jit(run, in_shardings=shardings, out_shardings=sharding.replicated(mesh))

        self.sums_of = compiled(held_out_sums)
        self.answers_of = compiled(partial(held_out_answers, options=options)) if config.eval_answers else None

    @property
    def compilations(self) -> int:
        """Number of programs that were compiled so far."""
        programs: int = self.sums_of._cache_size() + (self.answers_of._cache_size() if self.answers_of else 0)
        return programs

    def run(self, step: int, trainable: Any, frozen: Any, watchdog: Watchdog) -> dict[str, float]:
        """Return the record of the parameters after `step`; all processes take part and return the same losses."""
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        answers = []
        for number, own in enumerate(self.batches, 1):
            what = f"batch {number} of {len(self.batches)} of the evaluation at step {step}"
            with watchdog.waiting(f"{what} (the first evaluation is compiled)"):
                batch = distributed.global_batch(own, self.batch_at, self.rows)
                for name, term in jax.device_get(self.sums_of(trainable, frozen, batch)).items():
                    total, count = sums.get(name, (np.zeros(len(TASKS)), np.zeros(len(TASKS))))
                    sums[name] = total + term.sum, count + term.number
                if self.answers_of:
                    answers.append(jax.device_get(self.answers_of(trainable, frozen, batch)))
        record = loss_record(sums, self.config.loss)
        return record | answer_record(answers, self.examples, self.tokenizer)


def _batch_rows(most: int, mesh: Mesh, chosen: HeldOut) -> int:
    """Return the number of rows of an evaluation batch.

    It is enough for the fullest bucket, a multiple of the devices that share a batch, and at most `most`: a micro-batch
    of training, which is known to fit in memory.
    """
    shared = sharding.row_groups(mesh)
    fullest = max(len(group) for group in chosen.groups.values())
    return min(most, -(-fullest // shared) * shared)
