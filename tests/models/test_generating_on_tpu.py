"""What the TPU compiler makes of a decode step: which unit multiplies, in which type, and what is compared."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from crab_jax.aot import hlo
from crab_jax.compile import topology_devices
from crab_jax.generate import sample
from crab_jax.models.generating import FusedLlama, by_layer
from crab_jax.models.llama import LlamaConfig, init_cache
from crab_jax.models.lora import LoraConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)
CFG = LlamaConfig(vocab_size=2048, hidden=512, layers=2, heads=4, kv_heads=4, mlp_dim=1408, dtype="bfloat16")
MATRICES = 4 * CFG.layers + 1  # of a step: four for each layer, and the output matrix
SLOTS = 256


@pytest.fixture(scope="module")
def compiled():
    """Function that compiles a function for a TPU, as for a run: (function, shapes) -> HLO text."""
    on_chip = SingleDeviceSharding(topology_devices("v5e:1x1", thorough=True)[0])

    def text(function, *shapes):
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), shapes)
        return jax.jit(function).lower(*placed).compile().as_text()

    return text


@pytest.fixture(scope="module")
def steps(compiled):
    """Function that returns the HLO of three decode steps in a loop: (kind of weights, rows) -> text."""

    @functools.cache
    def of(kind, rows):
        model = FusedLlama(CFG, LoraConfig(rank=8, heads=3), kind)

        def read(model, tokens, slots, cache):
            hidden, cache = model(model.embed(tokens), slots, cache, slots)
            return sample(model.logits(hidden[:, 0]), None, 0.0, 1.0)[:, None], cache

        def run(params, tokens, slots, cache):
            def step(_, carry):
                tokens, slots, cache = carry
                tokens, cache = model.apply({"params": params}, tokens, slots, cache, method=read)
                return tokens, slots + 1, cache

            return jax.lax.fori_loop(0, 3, step, (tokens, slots, cache))

        given = (jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1), jnp.int32))
        cache = jax.eval_shape(lambda: by_layer(init_cache(CFG, rows, SLOTS)))
        params = jax.eval_shape(lambda cache: model.init(jax.random.key(0), *given, cache, method=read), cache)
        return compiled(run, params["params"], *given, cache)

    return of


def products(text: str, dtype: str) -> int:
    """Number of products of the matrix unit whose sums have this type."""
    return len(re.findall(rf"= {dtype}\[[\d,]*\]\S* convolution\(", text))


@pytest.mark.parametrize("rows", [1, 3])
def test_integers_are_multiplied_as_integers(steps, rows):
    assert products(steps("int8", rows), "s32") == MATRICES


@pytest.mark.parametrize("rows", [1, 3])
def test_the_matrix_unit_multiplies_one_row_too(steps, rows):
    """All weights, and in each layer the products of queries with keys and of weights with values."""
    text = steps("float", rows)
    assert products(text, "bf16") + products(text, "f32") >= MATRICES + 2 * CFG.layers


def test_a_loop_copies_no_cache(steps):
    """Attention reads it in the order in which the loop writes to it; what is copied lies before and after the loop."""
    program = hlo.ops(steps("float", 3))
    caches = [op for op in program if op.results and math.prod(op.results[0].shape) == 3 * 4 * SLOTS * 128]
    assert any(op.times == 3 for op in caches)
    assert not [op for op in caches if op.opcode == "copy" and op.times == 3 and not op.fused]


def test_near_values_are_no_ties(compiled):
    """The largest logit is found in float32, although it comes from a product of bfloat16 matrices."""

    def choose(hidden, kernel):
        return sample(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), None, 0.0, 1.0)

    text = compiled(choose, jnp.zeros((8, 512), jnp.bfloat16), jnp.zeros((512, 4096), jnp.bfloat16))
    reduced = re.findall(r"= (\S+) reduce\(", text)
    assert len(reduced) >= 2 and not [types for types in reduced if "bf16" in types]
