"""What a second model must have: Crab has it, and a model that is built otherwise is generated with by it alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.generate import GenerateOptions, generate, stream
from crab_jax.models.presets import crab_7b, tiny
from crab_jax.models.protocol import Model, ModelConfig


@pytest.mark.parametrize("config", [tiny(), crab_7b()])
def test_crab_is_a_model(config):
    assert isinstance(config, ModelConfig) and isinstance(config.build(), Model)
    assert config.build() == config.build() and hash(config.build()) == hash(config.build())


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocab_size: int = 23
    width: int = 16


@flax.struct.dataclass
class Prompts:
    tokens: jax.Array
    text_mask: jax.Array
    index: jax.Array
    grid: jax.Array  # bool[B,L] tokens of a picture, which share one position in time


class Pooled(nn.Module):
    """A model without attention, whose cache is a list of values, and whose positions have three axes.

    A token's state is the sum of the values in the slots up to its own, each of which knows its position.
    """

    cfg: Sizes = Sizes()

    def setup(self) -> None:
        self.table = nn.Embed(self.cfg.vocab_size, self.cfg.width)
        self.turn = nn.Embed(64, self.cfg.width)

    @nn.nowrap
    def positions(self, batch: Prompts) -> jax.Array:
        time = jnp.cumsum(~batch.grid, axis=1) - 1
        place = jnp.where(batch.grid, jnp.cumsum(batch.grid, axis=1), 0)
        return jnp.stack([time, time + place, time], axis=-1)

    @nn.nowrap
    def empty_cache(self, rows: int, slots: int) -> Any:
        return {"values": jnp.zeros((rows, slots, self.cfg.width))}

    @nn.nowrap
    def grown_cache(self, cache: Any, slots: int) -> Any:
        return {"values": jnp.pad(cache["values"], [(0, 0), (0, slots), (0, 0)])}

    def read(self, tokens: jax.Array, positions: jax.Array, slots: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        spread = positions[..., None] if positions.ndim == 2 else positions
        spread = jnp.broadcast_to(spread, (*tokens.shape, 3))
        values = jnp.tanh(self.table(tokens) + self.turn(spread % 64).sum(-2))
        kept = cache["values"].at[jnp.arange(len(tokens))[:, None], slots].set(values)
        seen = jnp.arange(kept.shape[1]) <= slots[..., None]
        return jnp.einsum("bln,bnd->bld", seen.astype(kept.dtype), kept), {"values": kept}

    def prefill(self, batch: Prompts, cache: Any) -> tuple[jax.Array, Any]:
        slots = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
        return self.read(batch.tokens, self.positions(batch), slots, cache)

    def decode(self, tokens: jax.Array, positions: jax.Array, slots: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return self.read(tokens, positions, slots, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.table.attend(hidden)


def prompts(lengths, width, grids):
    rng = np.random.default_rng(3)
    tokens = rng.integers(2, Sizes().vocab_size, (len(lengths), width)).astype(np.int32)
    grid = np.zeros((len(lengths), width), bool)
    for row, (start, end) in enumerate(grids):
        grid[row, start:end] = True
    mask = np.arange(width) < np.array(lengths)[:, None]
    index = np.arange(len(lengths), dtype=np.int32)
    return Prompts(*map(jnp.asarray, (np.where(mask, tokens, 0), mask, index, grid & mask)))


def by_hand(model, params, batch, row, count):
    """Tokens of one row, the whole sequence read anew for each of them."""
    length = int(batch.text_mask[row].sum())
    tokens = batch.tokens[row : row + 1, :length]
    positions = model.positions(jax.tree.map(lambda x: x[row : row + 1, :length] if x.ndim > 1 else x[:1], batch))
    first, made = int(positions.max()) + 1, []
    for step in range(count):
        slots = jnp.arange(tokens.shape[1])[None]
        cache = model.empty_cache(1, tokens.shape[1])
        hidden, _ = model.apply({"params": params}, tokens, positions, slots, cache, method="read")
        logits = model.apply({"params": params}, hidden[:, -1], method="logits")
        made.append(int(jnp.argmax(logits)))
        tokens = jnp.concatenate([tokens, jnp.array([[made[-1]]], jnp.int32)], axis=1)
        positions = jnp.concatenate([positions, jnp.full((1, 1, 3), first + step)], axis=1)
    return made


def test_a_model_with_positions_on_three_axes_generates_what_its_whole_sequences_say():
    """Its prompts are longer in slots than in positions, so that a cache slot is no position."""
    model, batch = Pooled(), prompts([9, 5, 7], 10, [(1, 6), (2, 4), (0, 0)])
    params = model.init(jax.random.key(0), batch, model.empty_cache(3, 10), method="prefill")["params"]
    options = GenerateOptions(
        eos_id=Sizes().vocab_size + 1, pad_id=0, mask_ids=(90, 91, 92, 93, 94, 95), max_new_tokens=6
    )
    expected = [by_hand(model, params, batch, row, 6) for row in range(3)]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert generate(model, params, batch, options).tokens.tolist() == expected
    assert stream(model, params, batch, options, lambda tokens, lengths: None).tokens.tolist() == expected
