"""LLaMA: the reference's logits and hidden states, the key tables, and the invariants of attention and cache."""

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file
from crab_jax.convert.keymap import from_params, to_params
from crab_jax.convert.llama import llama_config, llama_rules, lora_rules, lora_sizes, pad_vocab, trim_vocab
from crab_jax.io.errors import InputError
from crab_jax.models.attention import attend
from crab_jax.models.layers import RMSNorm
from crab_jax.models.llama import (
    REMAT,
    Attention,
    Llama,
    LlamaConfig,
    attend_cache,
    grow_cache,
    init_cache,
    mask_pads,
    rope,
    rotate,
)
from crab_jax.models.lora import LoraConfig, LoraDense

TINY = LlamaConfig(vocab_size=50, hidden=32, layers=3, heads=4, kv_heads=2, mlp_dim=48, dtype="float32")


def merge(a: dict, b: dict) -> dict:
    """Union of two nested dicts."""
    return {
        k: merge(a.get(k, {}), b.get(k, {})) if isinstance(a.get(k, b.get(k)), dict) else a.get(k, b.get(k))
        for k in a | b
    }


def forward(model: Llama, tokens, positions=None, key_mask=None):
    """Logits of a whole sequence; also the function that initialises every parameter."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(model.embed(tokens), positions, key_mask)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="mutable")
def compiled(model: Llama, params, method, *args, mutable=False):
    """Compiled `apply` of a function of the bound model."""
    return model.apply({"params": params}, *args, method=method, mutable=mutable)


def abstract_params(model: Llama):
    """The parameter tree with its logical axes, without arrays."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method=forward))["params"]


def random_params(model: Llama, scale: float = 0.3):
    """Parameters with every leaf random, LoRA's B included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), nn.unbox(abstract_params(model))
    )


@pytest.fixture(scope="module")
def files(golden):
    """(manifest, base config, LoRA config, shard tensors, LoRA tensors, rows of the added tokens)."""
    manifest = json.loads((golden / "manifest.json").read_text())
    directory = golden / "weights/llama"
    cfg = llama_config(json.loads((directory / "config.json").read_text()), dtype="float32")
    shards = torch_file.read_model_dir(directory)
    finetune = torch_file.read(golden / "weights/crab/finetune_weights.bin")
    rank, heads = lora_sizes(finetune)
    lora = LoraConfig(rank=rank, alpha=manifest["config"]["lora"]["lora_alpha"], heads=heads)
    return manifest, cfg, lora, shards, finetune, np.load(golden / "weights/crab/unsaved_state.npz")


@pytest.fixture(scope="module")
def base(files):
    """(model, params) of the LLaMA directory alone."""
    _, cfg, _, shards, _, _ = files
    return Llama(cfg), pad_vocab(to_params(llama_rules(cfg), shards), cfg)


@pytest.fixture(scope="module")
def tuned(files):
    """(model, params) with LoRA and the added tokens."""
    manifest, cfg, lora, shards, finetune, extra = files
    cfg = dataclasses.replace(cfg, vocab_size=manifest["vocab"]["with_mm_tokens"])
    params = pad_vocab(
        to_params(llama_rules(cfg), shards), cfg, extra["embed_tokens.new_rows"], extra["lm_head.new_rows"]
    )
    return Llama(cfg, lora), merge(params, to_params(lora_rules(cfg, lora), finetune))


def check_parity(z, prefix, tokens, model, params, tolerance, positions=None, mask=None):
    """Logits and every hidden state equal the reference's on real tokens."""
    logits, state = compiled(model, params, forward, tokens, positions, mask, mutable=("intermediates",))
    real = slice(None) if mask is None else mask
    expected = z[f"{prefix}.logits"]
    np.testing.assert_allclose(logits[..., : expected.shape[-1]][real], expected[real], rtol=0, atol=tolerance)
    assert (logits[..., model.cfg.vocab_size :] == -1e30).all()
    layers = state["intermediates"]["layers"]["hidden"][0]
    states = [model.apply({"params": params}, tokens, method="embed"), *layers]
    states[-1] = model.bind({"params": params}).norm(states[-1])
    for i, hidden in enumerate(states):
        np.testing.assert_allclose(hidden[real], z[f"{prefix}.hidden_states.{i}"][real], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tolerance(files) -> float:
    return 10 * files[0]["fp32_noise"]["llama.lora.logits(row 0)"]["max_abs_err_fp32_vs_fp64"]


def test_base_matches_the_reference(golden, base, tolerance):
    z = np.load(golden / "llama.npz")
    check_parity(
        z,
        "base",
        z["base.input_ids"],
        *base,
        tolerance,
        jnp.asarray(z["position_ids"]),
        z["attention_mask"].astype(bool),
    )


def test_lora_matches_the_reference_with_left_padding(golden, tuned, tolerance):
    z = np.load(golden / "llama.npz")
    assert not z["attention_mask"].all()
    check_parity(
        z, "lora", z["input_ids"], *tuned, tolerance, jnp.asarray(z["position_ids"]), z["attention_mask"].astype(bool)
    )


def test_lora_matches_the_reference_without_padding(golden, tuned, tolerance):
    z = np.load(golden / "llama.npz")
    full = z["input_ids"][z["attention_mask"].all(-1)][:1]
    check_parity(z, "lora_nomask", full, *tuned, tolerance)


def test_gate_of_the_first_layer_routes_as_the_reference(golden, tuned, tolerance):
    z = np.load(golden / "lora.npz")
    model, params = tuned
    gate = jax.tree.map(lambda leaf: leaf[0], params["layers"]["mlp"]["gate_proj"])
    y, state = LoraDense(z["gate0.y"].shape[-1], model.lora).apply({"params": gate}, z["gate0.x"], mutable=["router"])
    np.testing.assert_allclose(y, z["gate0.y"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(state["router"]["weights"][0], z["gate0.route_weight"], rtol=0, atol=tolerance)


def test_key_tables_fill_exactly_the_parameters_and_invert(files, tuned):
    _, cfg, lora, shards, finetune, extra = files
    model, params = tuned
    shapes = functools.partial(jax.tree.map, lambda leaf: leaf.shape)
    assert shapes(nn.unbox(abstract_params(model))) == shapes(params)
    back = from_params(llama_rules(cfg), trim_vocab(params, cfg.vocab_size))
    back |= from_params(lora_rules(cfg, lora), params)
    originals = {**shards, **{key: finetune[key] for key in finetune if ".lora_" in key}}
    assert set(back) == set(originals)
    for key, value in back.items():
        np.testing.assert_array_equal(value, originals[key], err_msg=key)


def test_lora_sizes_are_read_from_shapes():
    tensors = {"a.lora_A.weight": np.zeros((4, 9)), "a.lora_route.weight": np.zeros((5, 9))}
    assert lora_sizes(tensors) == (4, 5)
    with pytest.raises(InputError, match="no such weight"):
        lora_sizes({})


def test_vocabulary_must_match():
    params = {"embed_tokens": {"embedding": np.zeros((40, 4))}, "lm_head": {"kernel": np.zeros((4, 40))}}
    padded = pad_vocab(params, TINY, np.ones((10, 4)), np.ones((10, 4)))
    assert padded["embed_tokens"]["embedding"].shape == (128, 4) and padded["lm_head"]["kernel"].shape == (4, 128)
    with pytest.raises(InputError, match="40 rows for 50 tokens"):
        pad_vocab(params, TINY)


def test_seven_billion_parameters():
    def count(lora):
        tree = abstract_params(Llama(LlamaConfig(vocab_size=32000), lora))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    base = count(None)
    assert base == 6_738_415_616
    assert [count(LoraConfig(heads=n)) - base for n in (1, 3, 5)] == [21_127_168, 45_162_496, 69_197_824]


def test_every_parameter_names_its_axes():
    boxed = abstract_params(Llama(TINY, LoraConfig()))
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == len(leaf.value.shape)
    layers = boxed["layers"]["self_attn"]
    assert layers["k_proj"]["kernel"].names == ("layers", "embed", "kv")
    assert layers["o_proj"]["lora_B"].names == ("layers", None, None, "embed")


def test_grouped_queries_equal_repeated_keys():
    model = Llama(TINY, LoraConfig())
    params = random_params(model)
    full = Llama(dataclasses.replace(TINY, kv_heads=TINY.heads), LoraConfig())
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("k_proj", "v_proj"):
        for leaf in ("kernel", "lora_B"):
            value = params["layers"]["self_attn"][name][leaf]
            split = value.reshape(*value.shape[:-1], TINY.kv_heads, TINY.head_dim)
            repeated["layers"]["self_attn"][name][leaf] = jnp.repeat(split, 2, axis=-2).reshape(*value.shape[:-1], -1)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 50)
    np.testing.assert_allclose(
        compiled(model, params, forward, tokens), compiled(full, repeated, forward, tokens), rtol=1e-4, atol=1e-3
    )


def test_grouped_queries_never_repeat_the_keys():
    q, kv, mask = jnp.ones((1, 8, 1, 64)), jnp.ones((1, 1, 100, 64)), jnp.ones((1, 1, 100), bool)
    jaxpr = jax.make_jaxpr(attend)(q, kv, kv, mask)
    assert max(math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars) <= 100 * 64


def test_qkv_bias_is_a_weight_on_a_constant_input():
    """Attention with biases on x equals attention without on [x, 1], the biases being the last row of the kernels."""
    biased = dataclasses.replace(TINY, qkv_bias=True)
    x = jax.random.normal(jax.random.key(0), (2, 5, TINY.hidden))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    rest = (None, 0, positions, rope(positions, TINY.head_dim, TINY.rope_theta), None, None)
    params = nn.unbox(Attention(biased, None).init(jax.random.key(1), x, *rest))["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) * 0.3, params)
    assert "bias" not in params["o_proj"]
    folded = {
        name: {"kernel": jnp.concatenate([p["kernel"], p["bias"][None]])} if "bias" in p else p
        for name, p in params.items()
    }
    with_bias, _ = Attention(biased, None).apply({"params": params}, x, *rest)
    with_one, _ = Attention(TINY, None).apply({"params": folded}, jnp.concatenate([x, jnp.ones((2, 5, 1))], -1), *rest)
    np.testing.assert_allclose(with_bias, with_one, rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_equals_the_full_pass():
    """Right-padded prompts of different lengths in one batch, then single tokens in the slots of the pads."""
    model = Llama(TINY, LoraConfig())
    params = random_params(model)
    tokens = jax.random.randint(jax.random.key(2), (3, 12), 0, 50)
    expected = compiled(model, params, forward, tokens)
    lengths, padded = np.array([7, 4, 1]), 8
    positions = jnp.broadcast_to(jnp.arange(padded), (3, padded))
    prompt = jnp.where(positions < lengths[:, None], tokens[:, :padded], 49)

    def step(model, token, slots, cache):
        # Rotations are relative: positions may begin anywhere, slots are where keys and values are kept.
        hidden, cache = model(model.embed(token), slots + jnp.array([[0], [3], [11]]), cache=cache, slots=slots)
        return model.logits(hidden), cache

    logits, cache = compiled(model, params, step, prompt, positions, init_cache(TINY, 3, 12))
    rows = np.arange(3)
    np.testing.assert_allclose(logits[rows, lengths - 1], expected[rows, lengths - 1], rtol=1e-4, atol=1e-3)
    for i in range(5):
        at = lengths + i
        logits, cache = compiled(model, params, step, tokens[rows, at][:, None], jnp.asarray(at)[:, None], cache)
        np.testing.assert_allclose(logits[:, 0], expected[rows, at], rtol=1e-4, atol=1e-3)
    for key_mask, slots in ((jnp.ones((3, 1), bool), at[:, None]), (None, None)):
        with pytest.raises(ValueError, match="a cache needs slots"):
            model.apply({"params": params}, jnp.ones((3, 1, 32)), at[:, None], key_mask, cache, slots=slots)


def test_rematerialisation_changes_neither_loss_nor_gradient():
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    cfg = dataclasses.replace(TINY, layers=2)
    lora = LoraConfig(dropout=0.3)
    params = random_params(Llama(cfg, lora))

    def training(model, tokens):
        return model.logits(model(model.embed(tokens), positions, dropout_rows=jnp.arange(len(tokens)))[0])

    def loss(params, model):
        logits = model.apply({"params": params}, tokens, method=training, rngs={"dropout": jax.random.key(0)})
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    kept = [policy for policy in REMAT if policy != "offload"]  # XLA's CPU backend has no memory of the host
    plain, *others = (gradient(params, Llama(dataclasses.replace(cfg, remat=p), lora)) for p in ("none", *kept))
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, other)


def test_dropout_follows_its_seed():
    model = Llama(TINY, LoraConfig(dropout=0.5))
    params, x = random_params(model), jnp.ones((1, 4, TINY.hidden))

    @jax.jit
    def run(seed):
        return model.apply(
            {"params": params},
            x,
            jnp.arange(4)[None],
            dropout_rows=jnp.arange(len(x)),
            rngs={"dropout": jax.random.key(seed)},
        )[0]

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.allclose(run(0), run(1))


def test_bfloat16_keeps_float32_logits_close():
    model = Llama(TINY, LoraConfig())
    params = random_params(model, scale=0.1)
    half = Llama(dataclasses.replace(TINY, dtype="bfloat16"), LoraConfig())
    tokens = jnp.arange(8)[None]
    logits, state = compiled(half, params, forward, tokens, mutable=("router",))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[..., :50], compiled(model, params, forward, tokens)[..., :50], atol=0.1)
    assert state["router"]["layers"]["self_attn"]["q_proj"]["weights"][0].shape == (3, 1, 8, 3)


@pytest.mark.parametrize("length", [1, 5])
def test_a_bfloat16_cache_is_read_on_every_backend(length):
    """Scores are float32 sums of bfloat16 products, also of several rows and of grouped queries."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(((2, length, 4, 8), (2, 2, 8, 16), (2, 2, 16, 8)))
    )
    mask = jnp.ones((2, length, 16), bool)
    exact = attend_cache(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(jax.jit(attend_cache)(q, k, v, mask).astype(jnp.float32), exact, atol=0.03)


QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 90,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def test_config_is_read_from_hugging_face_files():
    assert llama_config(QWEN2, remat="none") == LlamaConfig(
        vocab_size=90,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_dim=96,
        rms_eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
        remat="none",
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_unsupported_language_models_are_refused(change, field):
    with pytest.raises(InputError, match=field):
        llama_config(QWEN2 | change)
    with pytest.raises(InputError, match="rms_norm_eps"):
        llama_config({key: value for key, value in QWEN2.items() if key != "rms_norm_eps"})


def test_the_default_is_llama_2_7b_with_the_tokens_of_crab():
    sizes = {"vocab_size": 32017, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008}
    numbers = {"rope_theta": 10000.0, "rms_eps": 1e-5, "qkv_bias": False}
    choices = {"remat": "auto", "attention": "auto", "dtype": "bfloat16"}
    assert dataclasses.asdict(LlamaConfig()) == {**sizes, **numbers, **choices}
    assert LlamaConfig().head_dim == 128
    assert [LlamaConfig(vocab_size=size).padded_vocab for size in (127, 128, 129, 32017)] == [128, 128, 256, 32128]


def test_the_axes_of_every_kind_of_parameter():
    """What a mesh may cut: rows and columns of matrices, never the rank of LoRA."""
    boxed = abstract_params(Llama(dataclasses.replace(TINY, qkv_bias=True), LoraConfig()))
    attention, mlp = boxed["layers"]["self_attn"], boxed["layers"]["mlp"]
    for name, axis in (("q_proj", "heads"), ("k_proj", "kv"), ("v_proj", "kv")):
        assert attention[name]["kernel"].names == ("layers", "embed", axis)
        assert attention[name]["bias"].names == ("layers", axis)
    assert attention["o_proj"]["kernel"].names == ("layers", "heads", "embed")
    assert mlp["gate_proj"]["kernel"].names == mlp["up_proj"]["kernel"].names == ("layers", "embed", "mlp")
    assert mlp["down_proj"]["kernel"].names == ("layers", "mlp", "embed")
    assert mlp["down_proj"]["lora_A"].names == ("layers", "mlp", None)
    assert mlp["down_proj"]["lora_route"].names == ("layers", "mlp", None)
    assert boxed["layers"]["input_layernorm"]["scale"].names == ("layers", "embed")
    assert boxed["norm"]["scale"].names == ("embed",)
    assert boxed["embed_tokens"]["embedding"].names == ("vocab", "embed")
    assert boxed["lm_head"]["kernel"].names == ("embed", "vocab")


def test_a_cache_has_a_slot_per_position_and_grows_with_empty_ones():
    cache = init_cache(TINY, 2, 3)
    assert cache.k.shape == (TINY.layers, 2, TINY.kv_heads, TINY.head_dim, 3) and cache.k.dtype == TINY.dtype
    assert cache.v.shape == (TINY.layers, 2, TINY.kv_heads, 3, TINY.head_dim) and not cache.v.any()
    assert init_cache(TINY, 2, 3, "bfloat16").v.dtype == jnp.bfloat16
    full = jax.tree.map(lambda x: x + 1, cache)
    grown = grow_cache(full, 2)
    assert grown.k.shape[-1] == grown.v.shape[-2] == 5
    assert (grown.k[..., :3] == 1).all() and (grown.v[..., :3, :] == 1).all()
    assert not grown.k[..., 3:].any() and not grown.v[..., 3:, :].any()


def test_a_key_mask_beside_a_cache_is_refused():
    model = Llama(TINY)
    x, positions = jnp.zeros((1, 2, TINY.hidden)), jnp.arange(2)[None]
    with pytest.raises(ValueError, match="key_mask"):
        model.init(jax.random.key(0), x, positions, jnp.ones((1, 2), bool), init_cache(TINY, 1, 2))


def test_rotation_by_hand():
    """Feature i and i + d/2 turn by position / theta^(2i/d)."""
    cos, sin = rope(jnp.array([[0, 3]]), 4, 100.0)
    np.testing.assert_allclose(cos[0, :, 0], [[1, 1], [np.cos(3), np.cos(0.3)]], rtol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], [[0, 0], [np.sin(3), np.sin(0.3)]], rtol=1e-6)
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]], [[1.0, 0.0, 0.0, 1.0]]]])
    wanted = [np.cos(3), -np.sin(0.3), np.sin(3), np.cos(0.3)]
    np.testing.assert_allclose(rotate(x, cos, sin)[0, :, 0], [[1, 2, 3, 4], wanted], rtol=1e-5)
    assert rotate(x.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_pads_of_the_vocabulary_can_never_be_chosen():
    np.testing.assert_array_equal(mask_pads(jnp.arange(4.0), 3), np.float32([0, 1, 2, -1e30]))


def test_every_layer_and_the_router_can_be_looked_at():
    model = Llama(TINY, LoraConfig())
    params = random_params(model)
    tokens = jnp.arange(6).reshape(2, 3)
    positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
    look = lambda m: (m.embed(tokens), m(m.embed(tokens), positions)[0])  # noqa: E731
    run = jax.jit(functools.partial(model.apply, method=look, mutable=["intermediates", "router"]))
    (_, hidden), seen = run({"params": params})
    states = seen["intermediates"]["layers"]["hidden"][0]
    assert states.shape == (TINY.layers, 2, 3, TINY.hidden)
    normed = RMSNorm(TINY.rms_eps).apply({"params": params["norm"]}, states[-1])
    np.testing.assert_allclose(normed, hidden, rtol=1e-5, atol=1e-5)
    assert len(jax.tree.leaves(seen["router"])) == 7
    variables = jax.eval_shape(functools.partial(model.init, method=look), jax.random.key(0))
    assert set(variables) == {"params"}, "init keeps no states"
