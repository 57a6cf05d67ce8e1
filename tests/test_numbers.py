"""What is no number ruins nothing but itself: a step on a toy model, rows of the real one, generation, integers."""

import dataclasses
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import losses, optim
from crab_jax.models.crab import CrabOutput
from crab_jax.models.quantize import dequantize, product, quantize
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.training import skip_guard, train_step
from data_pipelines.batching import Batch, Bucket, empty_batch
from data_pipelines.examples import Example

ROWS, LENGTH, SIDE, VOCAB = 4, 6, 4, 5
EXAMPLES = [Example(id=f"clip {i}", task="ave", instruction="") for i in range(9)]


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model whose rows depend on their own sound alone: logits are `scale` times (weights - shift) times its mean."""

    scale: float = 1.0
    shift: float = 0.0
    cfg: ClassVar = SimpleNamespace(vocab_size=VOCAB)

    def apply(self, variables, batch=None, dropout_rows=None, with_logits=True, rngs=None, method=None):
        if method == "output_matrix":
            return jnp.eye(VOCAB)
        heard = batch.fbank.mean((1, 2, 3))
        logits = heard[:, None] * self.scale * (variables["params"]["w"] - self.shift)
        text = jnp.broadcast_to(logits[:, None], (len(heard), LENGTH, VOCAB))
        pixels = jnp.broadcast_to(logits[:, :1, None, None], (len(heard), 1, SIDE, SIDE))
        return CrabOutput(None, text, pixels, jnp.stack([pixels] * 3, axis=2))


def batch_of(**changes) -> Batch:
    rng = np.random.default_rng(0)
    batch = empty_batch(Bucket(length=LENGTH, frames=1, windows=1, fbank_frames=98, masks=1), ROWS, SIDE)
    batch = batch.replace(
        tokens=rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        loss_mask=rng.random((ROWS, LENGTH)) < 0.6,
        fbank=rng.normal(1, 1, batch.fbank.shape).astype(np.float32),
        index=np.int32([5, 3, 8, 1]),
        seg_kind=np.int32([[1], [0], [2], [1]]),
        text_mask=np.ones((ROWS, LENGTH), bool),
    )
    return batch.replace(**changes)


def heard(row: int, value: float) -> np.ndarray:
    """The sound of `batch_of`, that of one row all `value`."""
    sound = batch_of().fbank.copy()
    sound[row] = value
    return sound


@partial(jax.jit, static_argnames=("model", "tx", "accumulate"))
def compiled(state, batch, model, tx, accumulate):
    return train_step.train_step(
        state, {}, batch, model=model, tx=tx, loss_cfg=losses.LossConfig(), seed=0, accumulate=accumulate
    )


@cache
def optimizer(**config):
    return optim.optimizer(optim.OptimConfig(**{"lr": 0.1, "schedule": "constant", "eps": 1e-4, **config}), 10)


def step(batch: Batch, model: Toy | None = None, w=None, accumulate: int = 1, **config):
    """(state before, state after, metrics) of one step at a rate that is not 0."""
    tx = optimizer(**config)
    params = {"w": jnp.linspace(-1, 1, VOCAB) if w is None else jnp.full(VOCAB, w)}
    opt = tx.update({"w": jnp.zeros(VOCAB)}, tx.init(params), params)[1]
    before = train_step.TrainState(jnp.int32(1), params, opt)
    after, metrics = compiled(before, batch, model or Toy(), tx, accumulate)
    return before, after, jax.device_get(metrics)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b))


def said(metrics) -> str:
    return skip_guard.SkipGuard(2, Path(), Watchdog(0), EXAMPLES).cause(metrics)


def assert_skipped(before, after, metrics) -> None:
    assert int(metrics["skipped"]) == 1 and int(after.step) == int(before.step) + 1
    assert same(after.trainable, before.trainable)
    for now, old in zip(jax.tree.leaves(after.opt), jax.tree.leaves(before.opt), strict=True):
        assert np.array_equal(now, old + (now.dtype == np.int32)), "moments stay, the schedule goes on"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_with_a_row_of_no_numbers_is_skipped_and_the_row_is_named(accumulate):
    before, after, metrics = step(batch_of(fbank=heard(2, np.nan)), accumulate=accumulate)
    assert_skipped(before, after, metrics)
    assert said(metrics) == "; of example 'clip 8' alone"
    sound = heard(2, np.inf)
    sound[0] = np.nan
    *_, metrics = step(batch_of(fbank=sound), accumulate=accumulate)
    assert int(metrics["skipped"]) == 1 and said(metrics) == "; of 2 examples"
    before, after, metrics = step(batch_of(), accumulate=accumulate)
    assert int(metrics["skipped"]) == 0 and int(metrics["bad_rows"]) == 0 and not same(after, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_filler_row_holds_reaches_neither_loss_nor_gradient(value, accumulate):
    filler = batch_of().index.copy()
    filler[2] = -1
    _, wanted, clean = step(batch_of(index=filler, fbank=heard(2, 0)), accumulate=accumulate)
    _, found, metrics = step(batch_of(index=filler, fbank=heard(2, value)), accumulate=accumulate)
    assert same((found, metrics), (wanted, clean)) and int(metrics["skipped"]) == 0


def test_a_step_counts_every_row_that_is_no_filler_whatever_its_micro_batch():
    """The index of a row says whether it is filler (-1), and nothing else; 0 is the first example."""
    read = np.arange(LENGTH) < np.array([[6], [5], [3], [1]])
    before, after, metrics = step(batch_of(text_mask=read))
    assert (int(metrics["tokens"]), int(metrics["slots"])) == (15, 24) and int(after.step) == int(before.step) + 1
    for changes in ({"accumulate": 2}, {"index": np.int32([5, 0, 8, 1])}):
        accumulate = changes.pop("accumulate", 1)
        _, again, others = step(batch_of(text_mask=read, **changes), accumulate=accumulate)
        np.testing.assert_allclose(again.trainable["w"], after.trainable["w"], rtol=1e-5)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
        for name in ("text", "bce", "dice", "ce"):
            np.testing.assert_allclose(others["terms"][name], metrics["terms"][name], rtol=1e-5)
    assert metrics["terms"]["bce"][1] == 2 and metrics["terms"]["ce"][1] == 1  # two binary masks, a semantic one
    assert metrics["terms"]["text"][1] == batch_of().loss_mask[:, 1:].sum()


def test_the_sum_of_the_indices_of_bad_rows_names_one_in_any_micro_batch():
    for accumulate in (1, 2):
        _, _, metrics = step(batch_of(fbank=heard(0, np.nan)), accumulate=accumulate)
        assert (int(metrics["bad_rows"]), int(metrics["bad_index"])) == (1, 5)


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is():
    """All its elements are finite; only their squares do not add up. Clipping would scale it to 0 and take the step."""
    before, after, metrics = step(batch_of(), Toy(scale=1e25, shift=1.0), w=1.0)
    assert np.isfinite(metrics["loss"]) and np.isinf(metrics["grad_norm"])
    assert_skipped(before, after, metrics)
    assert said(metrics) == "; the loss of every example is finite"


def test_parameters_that_would_overflow_skip_the_step_though_loss_and_gradient_are_finite():
    before, after, metrics = step(batch_of(), Toy(scale=1e-36), w=1e36, lr=10.0, weight_decay=100.0)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert_skipped(before, after, metrics)
    assert said(metrics) == "; the parameters after it would not be finite"


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_mask": np.zeros((ROWS, LENGTH), bool)},
        {"seg_kind": np.zeros((ROWS, 1), np.int32)},
        {"seg_kind": np.ones((ROWS, 1), np.int32)},
        {"seg_kind": np.full((ROWS, 1), 2, np.int32)},
        {"loss_mask": np.zeros((ROWS, LENGTH), bool), "seg_kind": np.zeros((ROWS, 1), np.int32)},
        {"index": np.full(ROWS, -1, np.int32)},
    ],
    ids=("no targets", "no masks", "binary", "semantic", "neither targets nor masks", "fillers"),
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_targets_no_masks_one_kind_alone_or_fillers_alone_divide_by_nothing(changes, accumulate):
    _, after, metrics = step(batch_of(**changes), accumulate=accumulate)
    assert int(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    nothing = not (batch_of(**changes).index >= 0).any() or len(changes) == 2
    assert nothing == (metrics["loss"] == 0) == (metrics["grad_norm"] == 0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_that_is_no_number_spoils_its_own_output_alone_as_integers(kind):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(128, 6)).astype(np.float32)
    broken = kernel.copy()
    broken[70, 4] = np.nan
    whole, spoiled = (quantize(jnp.asarray(k), kind) for k in (kernel, broken))
    x = jnp.asarray(rng.normal(size=(3, 128)), jnp.float32)
    others = np.arange(6) != 4
    assert np.isnan(product(x, **spoiled)[:, 4]).all(), "never a number made of it"
    np.testing.assert_array_equal(product(x, **spoiled)[:, others], product(x, **whole)[:, others])
    x = x.at[1].set(jnp.nan)  # an activation that is none: its row alone
    rows = np.array([0, 2])
    np.testing.assert_array_equal(product(x, **whole)[rows], product(x.at[1].set(0), **whole)[rows])
    for extreme in (3e38, 1e-38, 0.0):  # a scale that is largest, smallest, none
        parts = quantize(jnp.full((64, 2), extreme, jnp.float32), kind)
        np.testing.assert_allclose(dequantize(**parts), np.full((64, 2), extreme, np.float32), rtol=1e-2, atol=2e-38)
