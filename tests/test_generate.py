"""Generation on a language model alone: equals naive decoding, rows are independent, mask states are collected."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.generate import (
    Begun,
    GenerateOptions,
    _advance,
    _first_position,
    _start,
    finish,
    generate,
    sample,
    stream,
)
from crab_jax.io.errors import InputError
from crab_jax.models.llama import Llama, LlamaConfig, admitted, grow_cache, init_cache

EOS, PAD = 2, 0
MASKS = (11, 12, 13, 14, 15, 16)
OPTIONS = GenerateOptions(eos_id=EOS, pad_id=PAD, mask_ids=MASKS, max_new_tokens=12)


@dataclasses.dataclass(frozen=True)
class Config:
    llama: LlamaConfig = LlamaConfig(
        vocab_size=40, hidden=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, dtype="float32"
    )


@flax.struct.dataclass
class Prompts:
    tokens: jax.Array
    text_mask: jax.Array
    index: jax.Array


class TextOnly(nn.Module):
    """The methods generation needs, on text."""

    cfg: Config = Config()

    def setup(self):
        self.llama = Llama(self.cfg.llama)

    @nn.nowrap
    def positions(self, batch):
        return jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)

    @nn.nowrap
    def empty_cache(self, rows, slots):
        return init_cache(self.cfg.llama, rows, slots)

    @nn.nowrap
    def grown_cache(self, cache, slots):
        return grow_cache(cache, slots)

    def prefill(self, batch, cache):
        positions = self.positions(batch)
        return self.llama(self.llama.embed(batch.tokens), positions, cache=cache, slots=positions)

    def decode(self, token, positions, slots, cache):
        return self.llama(self.llama.embed(token), positions, cache=cache, slots=slots)

    def logits(self, hidden):
        return self.llama.logits(hidden)

    def full(self, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = self.llama(self.llama.embed(tokens), positions)
        return hidden, self.llama.logits(hidden)


MODEL = TextOnly()
compiled = jax.jit(generate, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(
        lambda: nn.unbox(MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="full")["params"])
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def prompts(rows: list[list[int]], width: int | None = None, index=None, junk: int = 7) -> Prompts:
    """Right-padded prompts; pads hold `junk`, which must not matter."""
    width = width or max(map(len, rows))
    return Prompts(
        jnp.array([row + [junk] * (width - len(row)) for row in rows], jnp.int32),
        jnp.array([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        jnp.asarray(range(len(rows)) if index is None else index, jnp.int32),
    )


ROWS = [[1, 5, 9, 21], [1, 33], [1, 8, 8, 30, 31, 4, 22], [1], [1, 17, 6, 38, 25]]


@jax.jit
def full(params, tokens):
    """(hidden, logits) of sequences, causal, without a cache."""
    return MODEL.apply({"params": params}, tokens, method="full")


@pytest.fixture(scope="module")
def endless(params):
    """Greedy decoding of every row by running its whole sequence again for each token, ignoring the end token."""
    continued = []
    for row in ROWS:
        sequence = list(row)
        for _ in range(OPTIONS.max_new_tokens):
            padded = jnp.array([sequence + [PAD] * (24 - len(sequence))])
            sequence.append(int(full(params, padded)[1][0, len(sequence) - 1].argmax()))
        continued.append(sequence[len(row) :])
    return continued


def until(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.fixture(scope="module")
def expected(endless):
    return [until(tokens, EOS) for tokens in endless]


def generated(out, row: int) -> list[int]:
    assert (out.tokens[row, out.lengths[row] :] == PAD).all()
    return out.tokens[row, : out.lengths[row]].tolist()


def test_greedy_equals_naive_decoding(params, expected):
    out = compiled(MODEL, params, prompts(ROWS), OPTIONS)
    assert [generated(out, i) for i in range(len(ROWS))] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_whose_logits_are_no_numbers_says_so_and_leaves_the_others_alone(params, expected, value):
    """The embedding of one token is broken: only the row that holds it is, from its first token on."""
    table = params["llama"]["embed_tokens"]["embedding"]
    broken = {"llama": params["llama"] | {"embed_tokens": {"embedding": table.at[35, 0].set(value)}}}
    rows = [0, 1, 2, 3]  # none of which writes token 35
    assert not any(35 in ROWS[row] + expected[row] for row in rows)
    asked = prompts([ROWS[row] for row in rows] + [[1, 35, 9]], 7)
    out = compiled(MODEL, broken, asked, OPTIONS)
    assert out.finite.tolist() == [True] * 4 + [False]
    assert [generated(out, row) for row in rows] == [expected[row] for row in rows]
    filler = compiled(MODEL, broken, asked.replace(index=jnp.array([0, 1, 2, 3, -1])), OPTIONS)
    assert filler.finite.all() and compiled(MODEL, params, asked, OPTIONS).finite.all()


@pytest.mark.parametrize(("order", "width"), [([4, 3, 2, 1, 0], 7), ([2, 2, 0], 16)])
def test_a_row_depends_on_neither_batch_nor_order_nor_padding(params, expected, order, width):
    out = compiled(MODEL, params, prompts([ROWS[i] for i in order], width, junk=39), OPTIONS)
    assert [generated(out, i) for i in range(len(order))] == [expected[i] for i in order]


def test_a_batch_equals_single_rows(params):
    batch = compiled(MODEL, params, prompts(ROWS), OPTIONS)
    for i, row in enumerate(ROWS):
        single = compiled(MODEL, params, prompts([row], 7), OPTIONS)
        np.testing.assert_array_equal(single.tokens[0], batch.tokens[i])
        np.testing.assert_allclose(single.mask_states[0], batch.mask_states[i], atol=1e-5)


def test_stops_at_the_end_token_and_keeps_others_going(params, endless):
    """Declare the fourth new token of row 0 the end token: that row ends there, the others as they would alone."""
    eos = endless[0][3]
    out = compiled(MODEL, params, prompts(ROWS), dataclasses.replace(OPTIONS, eos_id=eos))
    assert [generated(out, i) for i in range(len(ROWS))] == [until(tokens, eos) for tokens in endless]
    assert len({len(until(tokens, eos)) for tokens in endless}) > 1


def test_the_loop_ends_when_every_row_has_ended(params):
    """Three forced tokens need two decode steps: the first comes from the prompt, the last is not fed."""
    steps = []

    class Counting(TextOnly):
        def decode(self, token, positions, slots, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().decode(token, positions, slots, cache)

    forced = jnp.array([[5, 6, EOS] + [-1] * 9] * 2)
    out = compiled(Counting(), params, prompts(ROWS[:2]), OPTIONS, None, forced)
    jax.effects_barrier()
    assert out.lengths.tolist() == [3, 3]
    assert len(steps) == 2


def test_mask_states_are_the_states_that_predicted_the_mask_tokens(params):
    forced = jnp.full((3, 12), -1)
    forced = forced.at[0, :10].set(jnp.array([21, 22, 20, *MASKS, EOS]))
    forced = forced.at[1, :9].set(jnp.array([11, 12, 13, *MASKS])).at[1, 9].set(EOS)  # nine: the last six count
    forced = forced.at[2, :6].set(jnp.array([*MASKS[:5], EOS]))  # five: no mask
    out = compiled(MODEL, params, prompts(ROWS[:3]), OPTIONS, None, forced)
    assert out.has_mask.tolist() == [[True], [True], [False]]
    assert out.lengths.tolist() == [10, 10, 6]
    for row in (0, 1):
        new = out.tokens[row].tolist()
        hidden, _ = full(params, jnp.array([ROWS[row] + new]))
        first = len(ROWS[row]) + 3 - 1  # in both rows the six that count start at new token 3
        assert new[3:9] == list(MASKS)
        np.testing.assert_allclose(out.mask_states[row, 0], hidden[0, first : first + 6], rtol=1e-4, atol=1e-4)


def test_several_mask_groups_are_kept_in_their_order(params):
    """Two groups with text between; three of which two are kept; one; six mask tokens that are no ordered group."""
    longer = dataclasses.replace(OPTIONS, max_new_tokens=20, mask_groups=2)
    rows = [
        [21, *MASKS, 22, *MASKS, EOS],
        [*MASKS, *MASKS, *MASKS, EOS],
        [*MASKS, 21, MASKS[0], EOS],
        [*MASKS[1:], MASKS[0], EOS],
    ]
    forced = jnp.array([row + [-1] * (20 - len(row)) for row in rows])
    out = compiled(MODEL, params, prompts(ROWS[:4]), longer, None, forced)
    assert out.has_mask.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    for row, starts in enumerate([(1, 8), (6, 12), (0,), (0,)]):
        new = out.tokens[row, : out.lengths[row]].tolist()
        hidden, _ = full(params, jnp.array([(ROWS[row] + new + [PAD] * 24)[:28]]))
        for group, start in enumerate(starts):
            first = len(ROWS[row]) + start - 1
            np.testing.assert_allclose(out.mask_states[row, group], hidden[0, first : first + 6], rtol=1e-4, atol=1e-4)


def test_mask_tokens_are_appended_to_an_answer_without_any(params, endless):
    """At the end token; before the room ends; not where there is a mask already."""
    options = dataclasses.replace(OPTIONS, force_masks=True)
    forced = jnp.full((3, 12), -1).at[0, :3].set(jnp.array([5, 6, EOS])).at[1, :5].set(8)
    forced = forced.at[2, :7].set(jnp.array([*MASKS, EOS]))
    out = compiled(MODEL, params, prompts(ROWS[:3]), options, None, forced)
    assert [generated(out, row) for row in range(3)] == [
        [5, 6, *MASKS, EOS],
        [8, 8, 8, 8, 8, *MASKS, EOS],
        [*MASKS, EOS],
    ]
    assert out.forced.tolist() == [True, True, False] and out.has_mask.all()
    hidden, _ = full(params, jnp.array([ROWS[0] + generated(out, 0)]))
    np.testing.assert_allclose(out.mask_states[0, 0], hidden[0, 5:11], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="max_new_tokens"):
        dataclasses.replace(options, max_new_tokens=6)


def test_mask_tokens_that_an_answer_began_are_completed(params):
    """At the end token, and where the room ends; a group that is whole but for its end token needs nothing."""
    options = dataclasses.replace(OPTIONS, force_masks=True)
    forced = jnp.full((3, 12), -1).at[0, :3].set(jnp.array([*MASKS[:2], EOS]))
    forced = forced.at[1].set(jnp.array([MASKS[0], *[8] * 11]))
    forced = forced.at[2].set(jnp.array([*MASKS, *[8] * 6]))
    out = compiled(MODEL, params, prompts(ROWS[:3]), options, None, forced)
    assert [generated(out, row) for row in range(3)] == [
        [*MASKS, EOS],
        [MASKS[0], 8, 8, 8, 8, 8, *MASKS[1:], EOS],
        [*MASKS, *[8] * 6],
    ]
    assert out.forced.tolist() == [True, True, False] and out.has_mask.all()


def test_a_row_that_has_ended_is_forced_to_nothing(params):
    """A filler row, and one that ends while the other goes on."""
    options = dataclasses.replace(OPTIONS, force_masks=True)
    forced = jnp.full((3, 12), -1).at[0, :7].set(jnp.array([*MASKS, EOS])).at[1].set(8)
    out = compiled(MODEL, params, prompts(ROWS[:3], index=[0, 1, -1]), options, None, forced)
    assert out.lengths.tolist() == [7, 12, 0] and out.forced.tolist() == [False, True, False]
    assert out.has_mask.tolist() == [[True], [True], [False]]


def test_the_defaults_are_greedy_without_forcing():
    options = GenerateOptions(EOS, PAD, MASKS)
    assert (options.max_new_tokens, options.temperature, options.top_p) == (256, 0.0, 1.0)
    assert (options.mask_groups, options.force_masks) == (1, False)


def test_the_temperature_divides_the_logits():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]] * 200))
    keys = jax.random.split(jax.random.key(3), 200)
    wanted = jax.vmap(jax.random.categorical)(keys, logits / 4.0)
    assert sample(logits, keys, 4.0, 1.0).tolist() == wanted.tolist()
    assert sample(logits, keys, 4.0, 1.0).dtype == sample(logits, None, 0.0, 1.0).dtype == jnp.int32
    assert set(sample(logits, None, 0.0, 1.0).tolist()) == {2}


def test_a_stream_is_the_generation_as_it_comes(params):
    whole, heard = compiled(MODEL, params, prompts(ROWS), OPTIONS), []
    before = (_start._cache_size(), _advance._cache_size())
    for every in (4, 5):
        out = stream(
            MODEL,
            params,
            prompts(ROWS),
            OPTIONS,
            lambda tokens, lengths: heard.append([row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]),
            every,
        )
        assert heard[-1] == [generated(whole, row) for row in range(len(ROWS))]
        jax.tree.map(np.testing.assert_array_equal, (out.tokens, out.has_mask), (whole.tokens, whole.has_mask))
    assert [len(row[0]) for row in heard[:3]] == [1, 5, 9] and heard[0][0] == heard[2][0][:1]
    assert (_start._cache_size(), _advance._cache_size()) == (before[0] + 1, before[1] + 1), "compiled once"


def test_filler_rows_generate_nothing(params, expected):
    out = compiled(MODEL, params, prompts([ROWS[0], [], ROWS[1]], index=[0, -1, 1]), OPTIONS)
    assert generated(out, 0) == expected[0] and generated(out, 2) == expected[1]
    assert out.lengths[1] == 0 and not out.has_mask[1]


def test_another_batch_of_the_same_shape_compiles_nothing(params):
    compiled(MODEL, params, prompts(ROWS), OPTIONS)
    before = compiled._cache_size()
    compiled(MODEL, params, prompts(ROWS[::-1], junk=3), OPTIONS)
    compiled(MODEL, params, prompts([ROWS[1], [], [], [], []], 7, [1, -1, -1, -1, -1]), OPTIONS)
    assert compiled._cache_size() == before


def test_sampling_depends_on_the_seed_and_the_example_only(params):
    options = dataclasses.replace(OPTIONS, temperature=1.5, top_p=0.95)
    run = functools.partial(compiled, MODEL, params)
    out = run(prompts(ROWS), options, jax.random.key(0))
    shuffled = run(prompts([ROWS[i] for i in (3, 0)], 16, index=[3, 0]), options, jax.random.key(0))
    assert [generated(shuffled, i) for i in (0, 1)] == [generated(out, i) for i in (3, 0)]
    assert run(prompts(ROWS), options, jax.random.key(1)).tokens.tolist() != out.tokens.tolist()
    with pytest.raises(InputError, match="seed"):
        generate(MODEL, params, prompts(ROWS), options)


def test_the_largest_logit_is_chosen_however_near_the_others_are_and_the_first_of_equals():
    logits = np.zeros((4, 300), np.float32)
    logits[0, [7, 200, 299]] = 17.0, np.nextafter(np.float32(17), np.float32(18)), 17.0
    logits[1, [9, 30]] = 2.5
    logits[2, 299], logits[3, 5] = np.inf, np.nan
    assert sample(jnp.asarray(logits), None, 0.0, 1.0).tolist() == [200, 9, 299, 0]


def test_top_p_keeps_the_fewest_likely_tokens():
    logits = jnp.log(jnp.array([0.05, 0.5, 0.3, 0.15]))

    def draw(top_p):
        keys = jax.random.split(jax.random.key(0), 400)
        return set(sample(jnp.tile(logits, (400, 1)), keys, 1.0, top_p).tolist())

    assert draw(0.4) == {1}
    assert draw(0.6) == {1, 2}
    assert draw(0.9) == {1, 2, 3}
    assert draw(1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("max_new_tokens", (1, 2), (0, -1)),
        ("temperature", (0.0, 0.1), (-1.0, -0.01)),
        ("top_p", (0.01, 1.0), (0.0, 1.01)),
        ("mask_groups", (1, 2), (0,)),
    ],
)
def test_options_out_of_range_are_refused(field, allowed, refused):
    for value in allowed:
        assert getattr(dataclasses.replace(OPTIONS, **{field: value}), field) == value
    for value in refused:
        with pytest.raises(InputError, match=field):
            dataclasses.replace(OPTIONS, **{field: value})


def test_the_first_new_token_follows_the_largest_position_of_the_prompt_on_any_axis():
    """Prompts of 3 and 1 tokens; the positions of pads do not count."""
    mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    flat = jnp.array([[0, 5, 2, 9], [0, 8, 8, 8]])
    assert _first_position(flat, mask).tolist() == [6, 1] and _first_position(flat, mask).dtype == jnp.int32
    axes = jnp.stack([flat, flat.at[0, 2].set(7), flat.at[1, 0].set(3)], axis=-1)
    assert _first_position(axes, mask).tolist() == [8, 4]


def test_forced_masks_need_room_for_six_and_the_end():
    assert dataclasses.replace(OPTIONS, force_masks=True, max_new_tokens=7).force_masks
    with pytest.raises(InputError, match="at least 7"):
        dataclasses.replace(OPTIONS, force_masks=True, max_new_tokens=6)


def test_meshes_generate_what_one_device_does():
    """Eight virtual devices along data, along fsdp, and mixed with tensor, in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.same_generation"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for mesh, (same, furthest) in json.loads(done.stdout.splitlines()[-1]).items():
        assert same == 1.0 and furthest < 1e-5, mesh


@pytest.mark.parametrize("read", [[2, 1, 3, 0, 4], [1, 1, 1, 0, 2]])
def test_prompts_whose_beginning_is_read_already_are_continued_as_if_read_whole(params, expected, read):
    """Any part of a prompt may lie in the cache; what stands in the slots after it does not matter."""
    asked, forced = prompts(ROWS), jnp.full((5, 12), -1).at[:, 4:10].set(jnp.array(MASKS))

    def begun(options):
        whole = MODEL.empty_cache(5, 7 + options.max_new_tokens)
        beginnings = prompts([row[:count] for row, count in zip(ROWS, read, strict=True)], 5, junk=9)
        _, cache = MODEL.apply({"params": params}, beginnings, whole, method="prefill")
        return Begun(cache, jnp.asarray(read, jnp.int32), 8)

    out = compiled(MODEL, params, asked, OPTIONS, None, None, None, begun(OPTIONS))
    assert [generated(out, row) for row in range(len(ROWS))] == expected
    found = stream(MODEL, params, asked, OPTIONS, None, dictated=forced, begun=begun(OPTIONS))
    whole = compiled(MODEL, params, asked, OPTIONS, None, forced)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.mask_states, whole.mask_states, atol=1e-5)


def test_rows_need_not_have_chosen_the_same_number_of_tokens(params, expected):
    """A row that is replaced by the beginning of another prompt is continued beside rows that are further."""
    state = _start(MODEL, params, prompts(ROWS[:3], 7), OPTIONS)
    state = _advance(MODEL, params, state, OPTIONS, 3)
    fresh = _start(MODEL, params, prompts(ROWS[3:4], 7), OPTIONS)
    cache, rows = admitted(state.cache, fresh.cache, jnp.array([-1, 0, -1])), state.replace(cache=None)
    mixed = jax.tree.map(lambda old, new: old.at[1].set(new[0]), rows, fresh.replace(cache=None)).replace(cache=cache)
    out = finish(_advance(MODEL, params, mixed, OPTIONS, OPTIONS.max_new_tokens), OPTIONS)
    assert [generated(out, row) for row in range(3)] == [expected[row] for row in (0, 3, 2)]
