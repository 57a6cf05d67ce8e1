"""Comparison of a checkpoint's language model with logits that PyTorch stored for the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.convert.importing import read_arrays
from crab_jax.io.errors import InputError
from crab_jax.models import quantize
from crab_jax.models.crab import Crab
from crab_jax.runs import run_params


def text_logits(model: Crab, tokens: jax.Array, positions: jax.Array, key_mask: jax.Array) -> jax.Array:
    """Return logits float32[B,L,V] of text without media; `key_mask` bool[B,L] hides padding."""
    hidden, _ = model.llama(model.llama.embed(tokens), positions, key_mask)
    return model.logits(hidden)


def compare(ours: np.ndarray, reference: np.ndarray, k: int = 5) -> dict[str, float]:
    """Return the agreement of two sets of logits [N,V].

    kl_mean, kl_max: KL(reference || ours) in nats. top1: share of equal best tokens. top<k>: share of the reference's k
    best tokens that are among ours. max_abs: largest absolute difference.
    """
    log_ours, log_reference = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (ours.astype(np.float64), reference.astype(np.float64))
    )
    divergence = (np.exp(log_reference) * (log_reference - log_ours)).sum(-1)
    best, expected = (np.argsort(-x, axis=-1)[:, :k] for x in (log_ours, log_reference))
    shared = [len(np.intersect1d(a, b)) / k for a, b in zip(best, expected, strict=True)]
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "top1": float((best[:, 0] == expected[:, 0]).mean()),
        f"top{k}": float(np.mean(shared)),
        "max_abs": float(np.abs(ours - reference).max()),
    }


def verify(
    checkpoint: Path, outputs: Path, prefix: str = "", max_kl: float = 1e-2, weights: str = "float"
) -> dict[str, float]:
    """Compare the language model with a file of reference logits and return the agreement (see `compare`).

    The file holds `input_ids` int[B,L], `<prefix>logits` float[B,L,V], and optionally `attention_mask` and
    `position_ids`. weights: round the language model's matrices to integers first, as generation would. Raises
    InputError when the mean KL exceeds `max_kl`, or the file does not fit the model.
    """
    arrays: Any = read_arrays(outputs)
    for name in ("input_ids", f"{prefix}logits"):
        if name not in arrays:
            raise InputError(
                str(outputs),
                name,
                f"is missing; the file has {sorted(arrays)[:12]}",
                "store input_ids and logits, and give --prefix if the name has one",
            )
    tokens, reference = np.asarray(arrays["input_ids"], np.int32), np.asarray(arrays[f"{prefix}logits"])
    if reference.shape[:2] != tokens.shape:
        raise InputError(
            str(outputs),
            f"{prefix}logits",
            f"has shape {reference.shape} for ids {tokens.shape}",
            "store logits of the same ids",
        )
    mask = np.asarray(arrays["attention_mask"] if "attention_mask" in arrays else np.ones_like(tokens)).astype(bool)
    positions = np.asarray(arrays["position_ids"]) if "position_ids" in arrays else np.maximum(mask.cumsum(-1) - 1, 0)
    model, params, _, _ = run_params.load_model(checkpoint)
    if reference.shape[2] > model.cfg.llama.vocab_size or tokens.max() >= model.cfg.llama.vocab_size:
        raise InputError(
            str(outputs),
            f"{prefix}logits",
            f"is about {reference.shape[2]} tokens, the model has {model.cfg.llama.vocab_size}",
            "give outputs of the same model",
        )
    params = {**params, "llama": quantize.rounded(params["llama"], weights)}
    ours = jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=text_logits))(
        params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask)
    )
    agreement = compare(np.asarray(ours)[mask][:, : reference.shape[2]], reference[mask])
    if not agreement["kl_mean"] <= max_kl:
        raise InputError(
            str(checkpoint),
            "logits",
            f"mean KL from {outputs} is {agreement['kl_mean']:.3g} nats, more than "
            f"{max_kl:g} (top-1 agreement {agreement['top1']:.1%})",
            "check that the files and options of the import are those of the reference",
        )
    return agreement
