"""Programs of a step that are compiled ahead: they are those of the step, and none is compiled twice."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.training.step_programs import StepPrograms, abstract_batch
from data_pipelines.batching import Bucket, empty_batch

BUCKETS = [Bucket(length, 1, 1, 98, 0) for length in (8, 16, 24)]
STATE, FROZEN = {"w": jnp.arange(3.0)}, {"b": jnp.ones(3)}


def batch_of(bucket: Bucket, rows: int = 2):
    return empty_batch(bucket, rows, 8)


def shapes_of(bucket: Bucket, rows: int = 2):
    return abstract_batch(bucket, rows, 8, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def counted_step(traced: list[int]):
    """A step that notes the length of every bucket that it is traced for, and donates its state like the real one."""

    def step(state, frozen, batch):
        traced.append(batch.tokens.shape[1])
        return {"w": state["w"] + frozen["b"] * batch.tokens.shape[1]}, {"rows": len(batch.index)}

    return jax.jit(step, donate_argnums=0)


def test_shapes_are_those_of_a_batch():
    for bucket in BUCKETS:
        real, shapes = batch_of(bucket), shapes_of(bucket)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_every_bucket_is_compiled_once_ahead_or_when_it_comes():
    traced: list[int] = []
    step = counted_step(traced)
    programs = StepPrograms(step, STATE, FROZEN, map(shapes_of, BUCKETS[:2]))
    state, total = jax.tree.map(jnp.copy, STATE), 0
    for turn in range(2):
        for number, bucket in enumerate(BUCKETS):
            state, metrics = programs(state, FROZEN, batch_of(bucket))
            total += bucket.length
            np.testing.assert_array_equal(state["w"], STATE["w"] + total)
            assert metrics["rows"] == 2
            assert programs.used() == (number + 1 if turn == 0 else 3)
    assert sorted(traced) == [8, 16, 24] and step._cache_size() in (1, 2, 3)
    programs.close()


def test_what_is_not_compiled_yet_does_not_make_a_batch_wait():
    """Threads are held up by the first buckets: the last is compiled where it is needed, those are waited for."""
    traced: list[int] = []
    step, go = counted_step(traced), threading.Event()

    class Held:
        _cache_size = step._cache_size

        def __call__(self, *arguments):
            return step(*arguments)

        def lower(self, state, frozen, batch):
            assert go.wait(60)
            return step.lower(state, frozen, batch)

    programs = StepPrograms(Held(), STATE, FROZEN, map(shapes_of, BUCKETS))
    held = programs._pool._max_workers
    assert held >= 1
    last = BUCKETS[min(held, 2)]
    if held < len(BUCKETS):
        programs(jax.tree.map(jnp.copy, STATE), FROZEN, batch_of(last))
        assert traced == [last.length]
    go.set()
    for bucket in BUCKETS:
        programs(jax.tree.map(jnp.copy, STATE), FROZEN, batch_of(bucket))
    assert sorted(traced) == [8, 16, 24] and programs.used() == 3
    programs.close()


def test_what_fails_to_compile_fails_at_its_batch():
    def lower(state, frozen, batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    step = counted_step([])
    broken = type("Broken", (), {"lower": staticmethod(lower), "_cache_size": step._cache_size})()
    programs = StepPrograms(broken, STATE, FROZEN, [shapes_of(BUCKETS[0])])
    programs._programs[next(iter(programs._programs))].exception(60)  # has ended
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        programs(jax.tree.map(jnp.copy, STATE), FROZEN, batch_of(BUCKETS[0]))
    programs.close()
