"""The defaults of all stages under their former name; see crab_jax/defaults.py."""

from crab_jax.defaults import ENCODERS, FOURIER, LLAMA, LORA, QFORMERS, SEGMENTATION, base, released

__all__ = ["ENCODERS", "FOURIER", "LLAMA", "LORA", "QFORMERS", "SEGMENTATION", "base", "released"]
