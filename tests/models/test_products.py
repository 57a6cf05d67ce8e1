"""What a model of bfloat16 multiplies: matrices of bfloat16, whatever the dtype of its parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from crab_jax.models.beats import Beats
from crab_jax.models.clip import Clip
from crab_jax.models.generating import FusedLlama
from crab_jax.models.llama import Llama, init_cache
from crab_jax.models.mask_decoder import SegModule
from crab_jax.models.presets import tiny
from crab_jax.models.qformer import QFormer


def inputs_of_products(jaxpr):
    """Yield the dtypes of what each matrix product and convolution multiplies, also in loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield {str(variable.aval.dtype) for variable in equation.invars}
        for inner in jaxprs_in_params(equation.params):
            yield from inputs_of_products(inner)


def read(model, tokens, slots, cache):
    """Logits of a language model that fills a cache."""
    hidden, cache = model(model.embed(tokens), slots, cache=cache, slots=slots)
    return model.logits(hidden)


SIZES = tiny()
MODULES = ("clip", "beats", "visual", "llama", "seg")
CLIP, BEATS, QFORMER, LLAMA, SEG = (dataclasses.replace(getattr(SIZES, name), dtype="bfloat16") for name in MODULES)
PICTURES, FEATURES = jnp.zeros((1, CLIP.image_size, CLIP.image_size, 3)), jnp.zeros((1, CLIP.patches, CLIP.width))
TEXT = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32), init_cache(LLAMA, 2, 5)


@pytest.mark.parametrize(
    ("model", "inputs", "method", "wide"),
    [
        (Clip(CLIP), (PICTURES,), None, 0),
        (Beats(BEATS), (jnp.zeros((1, 98, 128)),), None, 0),
        (QFormer(QFORMER), (FEATURES,), None, 0),
        # Mask logits are resized in float32: each kind to two sizes, along two axes.
        (SegModule(SEG), (jnp.zeros((1, 6, SEG.llm_dim)), (FEATURES, FEATURES)), None, 8),
        # On CPU, attention to a cache has float32 inputs: once in the loop over layers, or in each layer.
        (Llama(LLAMA, SIZES.lora), TEXT, read, 1),
        (FusedLlama(LLAMA, SIZES.lora, "float"), TEXT, read, LLAMA.layers),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_products_are_of_bfloat16(model, inputs, method, wide):
    variables = jax.eval_shape(functools.partial(model.init, method=method), jax.random.key(0), *inputs)
    params = {"params": nn.unbox(variables["params"])}
    traced = jax.make_jaxpr(functools.partial(model.apply, method=method))(params, *inputs)
    found = [dtypes == {"bfloat16"} for dtypes in inputs_of_products(traced.jaxpr)]
    assert (found.count(False), len(found) > 5 + wide) == (wide, True)
