"""Losses agree with the released code, count only what they should, and add over micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import losses
from crab_jax.io.errors import InputError
from crab_jax.losses import BINARY, SEMANTIC, LossConfig, Term


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "losses.npz")


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    kind = np.array([BINARY, SEMANTIC, 0, BINARY, SEMANTIC, BINARY])
    return {
        "text": (normal(6, 9, 13), rng.integers(0, 13, (6, 9)), rng.random((6, 9)) < 0.5),
        "masks": (normal(6, 5, 7), normal(6, 4, 5, 7), rng.integers(0, 2, (6, 5, 7)), kind),
        "valid": np.array([True, True, True, True, True, False]),
    }


@jax.jit
def all_terms(text, masks, valid) -> dict[str, Term]:
    return {"text": losses.text_loss(*text, valid), **losses.mask_losses(*masks, valid)}


def terms(batch, rows=slice(None)) -> dict[str, Term]:
    return all_terms(*jax.tree.map(lambda x: x[rows], (batch["text"], batch["masks"], batch["valid"])))


def test_each_term_equals_the_released_one(arrays):
    logits, empty = arrays["bin.logits"], np.zeros_like(arrays["bin.gt"])
    for suffix, target in (("", arrays["bin.gt"]), ("_empty", empty)):
        np.testing.assert_allclose(losses.bce_rows(logits, target)[0], arrays[f"bce{suffix}"], rtol=1e-6)
        np.testing.assert_allclose(losses.dice_rows(logits, target)[0], arrays[f"dice{suffix}"], rtol=1e-6)
    np.testing.assert_allclose(
        losses.ce_rows(arrays["cls.logits"][None], arrays["cls.gt"])[0], arrays["avss_ce"], rtol=1e-6
    )


def test_text_loss_equals_the_released_one(arrays):
    labels = arrays["text.labels"]
    term = losses.text_loss(arrays["text.logits"], np.maximum(labels, 0), labels != -100, np.ones(len(labels), bool))
    assert term.number == (labels[:, 1:] != -100).sum()
    np.testing.assert_allclose(term.sum / term.number, arrays["text.ce"], rtol=1e-6)


def test_released_reduction_equals_the_released_mask_loss(golden, arrays):
    seg = np.load(golden / "seg.npz")
    for state in ("avs",):
        for name, samples in (("s4", [0]), ("ms3+s4", [0, 2])):
            logits = np.concatenate([seg[f"{state}.pred_masks.{i}"] for i in samples])
            target = np.concatenate([seg[f"gt.{i}"] for i in samples]).astype(np.int32)
            rows = len(samples)
            found = losses.mask_losses(logits, None, target, np.full(rows, BINARY), np.ones(rows, bool))
            total = losses.total({"text": Term(0.0, 1.0), **found}, LossConfig(reduction="released"))
            np.testing.assert_allclose(total, arrays[f"{state}.mask_loss.{name}"], rtol=1e-6)


def test_rows_of_another_kind_and_filler_rows_do_not_count(batch):
    found = terms(batch)
    binary, semantic, target, _ = batch["masks"]
    expected = {
        "bce": losses.bce_rows(binary, target)[jnp.array([0, 3])],
        "dice": losses.dice_rows(binary, target)[jnp.array([0, 3])],
        "ce": losses.ce_rows(semantic, target)[jnp.array([1, 4])],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].sum, values.sum(), rtol=1e-6)
        assert found[name].number == 2
    mask = batch["text"][2] & batch["valid"][:, None]
    assert found["text"].number == mask[:, 1:].sum()


def test_mean_reduction_is_the_mean_over_mask_samples(batch):
    found, cfg = terms(batch), LossConfig(text=0.25, bce=2.0, dice=3.0, ce=5.0)
    expected = 0.25 * found["text"].sum / found["text"].number
    expected += (2 * found["bce"].sum + 3 * found["dice"].sum + 5 * found["ce"].sum) / 4
    np.testing.assert_allclose(losses.total(found, cfg), expected, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "released"])
def test_micro_batches_add_up_to_the_batch(batch, reduction):
    cfg = LossConfig(reduction=reduction)
    counts = losses.batch_counts(batch["text"][2], batch["masks"][3], batch["valid"])
    whole = terms(batch)
    assert {name: float(term.number) for name, term in whole.items()} == {k: float(v) for k, v in counts.items()}
    parts = sum(losses.total(terms(batch, rows), cfg, counts) for rows in (slice(0, 2), slice(2, 4), slice(4, 6)))
    np.testing.assert_allclose(parts, losses.total(whole, cfg), rtol=1e-6)


def test_a_batch_without_targets_or_masks_costs_nothing(batch):
    logits, tokens, loss_mask = batch["text"]
    nothing = losses.text_loss(logits, tokens, np.zeros_like(loss_mask), batch["valid"])
    masks = losses.mask_losses(None, None, batch["masks"][2], np.zeros(6, int), batch["valid"])
    assert losses.total({"text": nothing, **masks}, LossConfig()) == 0
    assert losses.total({"text": nothing}, LossConfig()) == 0


def test_by_task_splits_a_term(batch):
    rows = losses.text_rows(*batch["text"], batch["valid"])
    task = np.array([2, 0, 2, 1, 0, 1])
    split = losses.by_task(rows, task, 4)
    for index in range(4):
        np.testing.assert_allclose(split.sum[index], rows.sum[task == index].sum(), rtol=1e-6)
        assert split.number[index] == rows.number[task == index].sum()
    assert split.number[3] == 0


def test_gradients_are_finite_for_extreme_logits_and_unused_rows(batch):
    _, _, target, kind = batch["masks"]
    scale = np.where(np.arange(6) % 2, 1e4, -1e4).astype(np.float32)

    def loss(binary, semantic):
        found = losses.mask_losses(binary, semantic, target, kind, batch["valid"])
        return losses.total({"text": Term(0.0, 0.0), **found}, LossConfig())

    binary, semantic = batch["masks"][0] * scale[:, None, None], batch["masks"][1] * scale[:, None, None, None]
    grads = jax.jit(jax.grad(loss, (0, 1)))(binary, semantic)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(grads[0][np.array([1, 2, 4, 5])]) and not np.any(grads[1][np.array([0, 2, 3, 5])])


def test_an_unknown_reduction_is_refused():
    with pytest.raises(InputError, match="reduction"):
        LossConfig(reduction="sum")


def test_the_default_weights_are_those_of_the_paper():
    assert vars(LossConfig()) == {"text": 1.0, "bce": 1.0, "dice": 0.5, "ce": 1.0, "reduction": "mean"}


@pytest.mark.parametrize("term", ["text", "bce", "dice", "ce"])
def test_a_weight_is_zero_or_within_its_bounds(term):
    for value in (0, 1e-9, 1e9):
        assert getattr(LossConfig(**{term: value}), term) == value
    for value in (-1e-9, 1e-10, 1.1e9, float("nan"), float("inf"), True, "1"):
        with pytest.raises(InputError, match="must be") as error:
            LossConfig(**{term: value})
        assert error.value.field == f"loss.{term}"


def test_text_loss_by_hand():
    """Position i - 1 predicts token i; what precedes the first token, and a filler row, predict nothing."""
    probability = np.array([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.6, 0.3, 0.1]])
    logits = np.stack([np.log(probability) + 3, np.log(probability)]).astype(np.float32)
    tokens, counted = np.array([[1, 2, 0], [1, 2, 0]]), np.array([[True, True, True], [True, True, True]])
    rows = losses.text_rows(logits, tokens, counted, np.array([True, False]))
    np.testing.assert_allclose(rows.sum, [-np.log(0.7) - np.log(0.5), 0], rtol=1e-5)
    assert rows.number.tolist() == [2, 0]


def test_terms_and_counts_are_float32_whatever_the_logits_are(batch):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x, batch)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x, half)
    found, wanted = terms(half), terms(rounded)
    counts = losses.batch_counts(batch["text"][2], batch["masks"][3], batch["valid"])
    assert {x.dtype for x in jax.tree.leaves((found, counts))} == {np.dtype(np.float32)}
    for name, term in found.items():
        np.testing.assert_allclose(term.sum, wanted[name].sum, rtol=1e-6)
    absent = losses.mask_rows(None, None, batch["masks"][2], batch["masks"][3], batch["valid"])
    assert all(x.dtype == jnp.float32 and x.shape == (6,) and not x.any() for x in jax.tree.leaves(absent))


def test_counts_of_several_mask_groups_per_row(batch):
    kind = np.array([[BINARY, SEMANTIC], [0, 0], [BINARY, BINARY], [SEMANTIC, 0], [0, 0], [SEMANTIC, BINARY]])
    counts = losses.batch_counts(batch["text"][2], kind, batch["valid"])
    assert [float(counts[name]) for name in ("bce", "dice", "ce")] == [3, 3, 2], "the last row is filler"


def test_a_sample_is_weighted_by_its_kind_in_the_released_reduction():
    found = {name: Term(jnp.float32(value), jnp.float32(number)) for name, value, number in (
        ("text", 6.0, 3.0), ("bce", 4.0, 3.0), ("dice", 2.0, 3.0), ("ce", 7.0, 1.0))}  # fmt: skip
    cfg = LossConfig(text=0.5, bce=1.0, dice=10.0, ce=100.0, reduction="released")
    assert losses.total(found, cfg) == 1 + (24 * 3 + 700 * 1) / 4
    mean = LossConfig(text=0.5, bce=1.0, dice=10.0, ce=100.0)
    assert losses.total(found, mean) == 1 + (24 + 700) / 4
    assert losses.total({"text": found["text"]}, cfg) == 1


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])
def test_logits_at_targets_alone_give_the_loss_and_gradients_of_all_logits(chunk):
    """Rows with no target, one, all, some that lie apart, a filler row; any chunk; padding of the vocabulary."""
    rng = np.random.default_rng(0)
    rows, length, width, vocab = 5, 12, 8, 17
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(width, 24)), jnp.float32)
    tokens = rng.integers(0, vocab, (rows, length))
    mask = np.zeros((rows, length), bool)
    mask[1, -1], mask[2], mask[3, [2, 5, 11]], mask[4] = True, True, True, True
    valid = np.array([True, True, True, True, False])

    def plain(hidden, matrix):
        logits = jnp.where(jnp.arange(24) < vocab, hidden @ matrix, -1e30)
        return losses.text_rows(logits, tokens, mask, valid)

    def at_targets(hidden, matrix):
        return losses.text_rows_of(hidden, matrix, vocab, tokens, mask, valid, chunk)

    for found, wanted in zip(jax.jit(at_targets)(hidden, matrix), plain(hidden, matrix), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    weights = jnp.arange(1.0, rows + 1)
    gradients = [
        jax.grad(lambda *x, of=of: (of(*x).sum * weights).sum(), (0, 1))(hidden, matrix) for of in (at_targets, plain)
    ]
    for found, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert float(at_targets(hidden, matrix).number.sum()) == 1 + 11 + 3


def test_logits_of_a_chunk_exist_only_where_some_row_has_targets_left():
    """16 positions, 2 targets: of 8 chunks, seven are not computed, so that infinite states there change nothing."""
    hidden = jnp.full((1, 16, 4), jnp.inf).at[:, :2].set(1.0)
    mask = np.zeros((1, 16), bool)
    mask[0, 1:3] = True
    found = losses.text_rows_of(hidden, jnp.ones((4, 8)), 8, np.zeros((1, 16), int), mask, np.array([True]), 2)
    assert float(found.sum[0]) == pytest.approx(2 * np.log(8))
