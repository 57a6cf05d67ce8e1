"""The cache of encoded clips: one that is asked about again is not encoded again, and it does not grow."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from crab_jax import inference


def test_the_cache_of_features_keeps_the_latest_and_no_more_than_its_bound(monkeypatch):
    encoded: list[int] = []

    def encode(model, params, frames, fbank, mesh):
        encoded.extend(int(frame[0]) for frame in frames[:1])  # the rest repeats it
        return jnp.asarray(frames, jnp.float32)[:, None]

    def clip(number: int) -> SimpleNamespace:
        return SimpleNamespace(frames=np.full((1, 2), number, np.uint8), fbank=np.zeros((1, 3), np.float32))

    monkeypatch.setattr(inference, "_encode", encode)
    monkeypatch.setattr(inference, "KEPT_BYTES", 3 * 8 + 7)  # three clips of two float32
    cache = inference.Encoder(None, {})
    for number in (1, 2, 3, 1, 4, 1, 3, 2):
        assert float(cache(clip(number))[0, 0, 0]) == number
        assert len(cache.kept) <= 3
    assert encoded == [1, 2, 3, 4, 2], "the one asked about least lately went"
