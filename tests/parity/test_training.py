"""The loss of mixed batches and the gradient of every trainable group.

A batch of the reference mixes samples of different sizes; here each size is a batch of its own, divided by the counts
of the whole, so that losses and gradients add up to those of the mixed batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from crab_jax import losses
from crab_jax.convert.keymap import from_params
from crab_jax.convert.llama import PEFT, trim_vocab, vocab_rules
from crab_jax.convert.released import crab_rules
from crab_jax.training.train_step import loss_rows

RELEASED = losses.LossConfig(reduction="released")


@jax.jit
def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _loss(trained, encoders, model, batch, counts):
    rows = loss_rows(model.apply({"params": {**trained, **encoders}}, batch), batch)
    terms = {name: losses.pool(term) for name, term in rows.items()}
    text = losses.total({"text": terms["text"]}, RELEASED, counts)
    return losses.total(terms, RELEASED, counts), text


_value_and_grad = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=2)


def mixed(model, params, batches):
    """((loss, its text part), gradients) of a batch given as batches of one row; the encoders are frozen."""
    encoders = {name: params[name] for name in ("clip", "beats")}
    trained = {name: tree for name, tree in params.items() if name not in encoders}
    counts = [losses.batch_counts(b.loss_mask, b.seg_kind, b.index >= 0) for b in batches]
    counts = {name: sum(c[name] for c in counts) for name in counts[0]}
    found = [_value_and_grad(trained, encoders, model, batch, counts) for batch in batches]
    (loss, text), grads = found[0]
    for (more, more_text), more_grads in found[1:]:
        loss, text, grads = loss + more, text + more_text, _add(grads, more_grads)
    return (loss, text), grads


def released_names(cfg, params):
    """Trainable tensors under the reference's names."""
    llama = trim_vocab(params["llama"], cfg.llama.vocab_size)
    rules = [rule for rules in crab_rules(cfg).values() for rule in rules]
    return from_params(rules, params) | from_params(vocab_rules(PEFT), llama)


def group_of(name: str) -> str:
    """The reference's group of a tensor."""
    for part in ("lora_route", "lora_A", "lora_B", "vl_projector", "al_projector", "seg_module", "embed_tokens"):
        if part in name:
            return part
    return "lm_head"


@pytest.fixture(scope="module")
def step(data, load, sample):
    made = {}

    def run(name: str):
        if name not in made:
            record = data.json("train_step.json").get(name)
            arrays = data.arrays("train_step.npz", f"{name}.")  # skips when the whole step is left out
            model, params = load(name.removesuffix("_mix"))
            masks = [record["is_avs_task"] and data.has_mask(s) for s in record["samples"]]
            batches = [sample(s, masks=m) for s, m in zip(record["samples"], masks, strict=True)]
            value, grads = mixed(model, params, batches)
            made[name] = record, arrays, value, released_names(model.cfg, grads)
        return made[name]

    return run


def test_loss_of_the_mixed_batch(step_case, step):
    record, arrays, (loss, text), _ = step(step_case)
    noise = max(10 * abs(record["loss"] - record["fp64"]["loss"]), 1e-6 * record["loss"])
    assert abs(loss - arrays["loss"]) <= noise and abs(text - arrays["text_loss"]) <= noise
    assert abs((loss - text) - arrays["mask_loss"]) <= noise


def test_gradient_norm_of_every_group_and_tensor(step_case, step):
    record, _, _, grads = step(step_case)
    exact = record["fp64"]["group_grad_norm"]
    noise = max(abs(record["group_grad_norm"][g] - exact[g]) / exact[g] for g in exact)  # of one number it may be 0
    groups: dict[str, float] = {}
    for key, grad in grads.items():
        groups[group_of(key)] = groups.get(group_of(key), 0.0) + float((grad.astype(np.float64) ** 2).sum())
    assert set(groups) >= set(exact)
    for group, expected in exact.items():
        assert groups[group] ** 0.5 == pytest.approx(expected, rel=10 * noise), group
    for group in set(groups) - set(exact):  # left out by the reference because nothing reaches it
        assert groups[group] == 0

    single = record.get("param_grad_norm", {})  # the committed directory keeps them for one step
    for key in single.keys() - grads.keys():
        assert not single[key], f"{key} has a gradient in the reference and no counterpart here"
    for key in single.keys() & grads.keys():
        scale = record["group_grad_norm"][group_of(key)]
        norm = float(np.linalg.norm(grads[key]))
        assert norm == pytest.approx(single[key] or 0.0, rel=10 * noise, abs=1e-6 * scale), key


def test_gradients_element_by_element(step_case, step):
    record, arrays, _, grads = step(step_case)
    errors = record["fp64"]["full_grad_err"]
    worst = max(error["max_abs_err"] / error["max_abs"] for error in errors.values())
    compared = 0
    for key, expected in arrays.items():
        if key.startswith("grad."):
            key = key.removeprefix("grad.")
            noise = (
                max(10 * errors[key]["max_abs_err"], 1e-6 * errors[key]["max_abs"])
                if key in errors
                else 10 * worst * np.abs(expected).max()
            )
            np.testing.assert_allclose(grads[key], expected, rtol=0, atol=noise, err_msg=key)
            compared += 1
    assert compared


def worst_error(data) -> float:
    """Largest relative float32 error of a gradient that the reference records."""
    steps = [record["fp64"] for record in data.json("train_step.json").values() if "fp64" in record]
    return max(e["max_abs_err"] / e["max_abs"] for step in steps for e in step["full_grad_err"].values())


@pytest.mark.slow
def test_the_adamw_trajectory(data, load, sample):
    """Clipped steps of the mask stage: losses, norms, and where the weights end.

    No float64 trajectory is recorded, so the tolerance is ten times what the recorded error of gradients does to ours:
    Adam divides by their size, which makes much of an error in a small one.
    """
    record = data.json("train_step.json")["adamw_trajectory"]
    z = data.arrays("train_step.npz", "traj.")
    model, params = load("avs")
    batches = [sample(s, masks=data.has_mask(s)) for s in record["samples"]]
    flat = traverse_util.flatten_dict(params)
    start = {
        path: leaf for path, leaf in flat.items() if set(path) & set(record["groups"]) and "positional" not in path[-1]
    }
    assert record["weight_decay"] == 0
    adam = optax.scale_by_adam(b1=record["betas"][0], b2=record["betas"][1], eps=record["eps"])
    rng = np.random.default_rng(0)

    @jax.jit
    def advance(grads, state, trained, rate):
        norm = optax.global_norm(grads)
        shrink = jnp.minimum(1.0, record["clip"] / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
        updates, state = adam.update(jax.tree.map(lambda g: g * shrink, grads), state)
        return norm, state, jax.tree.map(lambda p, u: p - rate * u, trained, updates)

    def disturbed(grad, error: float) -> np.ndarray:
        return grad + np.float32(error * np.abs(grad).max()) * rng.uniform(-1, 1, grad.shape).astype(np.float32)

    def steps(error: float) -> dict[str, np.ndarray]:
        trained, state, losses, norms = start, jax.jit(adam.init)(start), [], []
        for rate in z["lr"]:
            (loss, _), grads = mixed(model, traverse_util.unflatten_dict(flat | trained), batches)
            grads = traverse_util.flatten_dict(grads)
            grads = {path: disturbed(np.asarray(grads[path]), error) for path in trained}
            norm, state, trained = advance(grads, state, trained, rate)
            losses.append(loss)
            norms.append(norm)
        rows = trained["llama", "embed_tokens", "embedding"][: model.cfg.llama.vocab_size]
        found = {
            "losses": losses,
            "grad_norm": norms,
            "final.no_mask_embed": trained["seg_module", "no_mask_embed"],
            "final.embed_tokens.last17": rows[-len(z["final.embed_tokens.last17"]) :],
        }
        return {name: np.asarray(value) for name, value in found.items()}

    ours, moved = steps(0.0), steps(worst_error(data))
    for name, found in ours.items():
        noise = 10 * np.abs(moved[name] - found).max()
        np.testing.assert_allclose(found, z[name], rtol=0, atol=max(noise, 1e-6 * np.abs(z[name]).max()), err_msg=name)
