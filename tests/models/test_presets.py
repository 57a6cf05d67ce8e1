"""The sizes of the models by name: those of the paper and the released code, and how sizes must fit each other."""

import dataclasses

import pytest

from crab_jax.io.errors import InputError
from crab_jax.models.presets import BOUNDS, MODELS, bound_of, crab_7b, tiny

# Classic Crab: CLIP ViT-L/14 at 224, BEATs iter3+ (BEATsConfig), BERT-base Q-Formers of two layers and 32 queries,
# LLaMA-2-7B with 17 further tokens, LoRA with three heads, and the mask decoder of the released code.
PAPER = {
    "clip": {
        "image_size": 224,
        "patch_size": 14,
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_dim": 4096,
        "taps": (14, 22, 23),
        "dtype": "bfloat16",
    },
    "beats": {
        "layers": 12,
        "width": 768,
        "heads": 12,
        "mlp_dim": 3072,
        "embed_dim": 512,
        "patch_size": 16,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "num_buckets": 320,
        "max_distance": 800,
        "dtype": "bfloat16",
    },
    "llama": {
        "vocab_size": 32000 + 17,
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 32,
        "mlp_dim": 11008,
        "rope_theta": 10000.0,
        "rms_eps": 1e-5,
        "qkv_bias": False,
        "attention": "auto",
        "dtype": "bfloat16",
    },
    "lora": {"rank": 8, "alpha": 16.0, "heads": 3, "dropout": 0.05, "dropout_bits": "hash"},
    "seg": {
        "llm_dim": 4096,
        "image_dim": 1024,
        "grid": 16,
        "image_size": 224,
        "dim": 256,
        "queries": 300,
        "heads": 8,
        "mlp_dim": 2048,
        "query_layers": 2,
        "query_mlp_dim": 2048,
        "depth": 2,
        "low_res": 112,
        "classes": 71,
        "scales": 2,
        "tokens_per_scale": 3,
    },
}
QFORMER = {"width": 768, "heads": 12, "mlp_dim": 3072, "layers": 2, "queries": 32, "dropout": 0.1, "out_dim": 4096}
PAPER |= {"visual": {**QFORMER, "in_dim": 1024}, "audio": {**QFORMER, "in_dim": 768}}


@pytest.mark.parametrize("module", PAPER)
def test_the_model_of_the_paper(module):
    there = dataclasses.asdict(getattr(crab_7b(), module))
    assert {name: there[name] for name in PAPER[module]} == PAPER[module]
    assert {"tiny": tiny, "crab_7b": crab_7b} == MODELS
    assert crab_7b().seg_taps == (0, 2)  # the mask decoder sees the hidden states 14 and 23 of CLIP


TINY = {
    "clip": (64, 8, 128, 4, 4, 384, (2, 3, 4)),  # picture, patch, width, layers, heads, MLP, taps
    "beats": (3, 96, 4, 288, 64, 16, 16, 4),  # layers, width, heads, MLP, patch embedding, patch, convolution, groups
    "llama": (657, 128, 4, 4, 4, 384),  # vocabulary, width, layers, heads, key heads, MLP
    "lora": (8, 16.0, 3, 0.0),
    "seg": (128, 128, 8, 64, 64, 16, 4, 128),  # LLM, picture, grid, size, width, queries, heads, MLP
}


@pytest.mark.parametrize("module", TINY)
def test_the_tiny_model(module):
    """Every stored run of the demo, and the packaged warm start, have these sizes."""
    cfg = getattr(tiny(), module)
    assert dataclasses.astuple(cfg)[: len(TINY[module])] == TINY[module]
    assert getattr(cfg, "dtype", "float32") == "float32"
    sizes = tiny()
    for qformer, inputs, queries in ((sizes.visual, 128, 3), (sizes.audio, 96, 2)):
        assert dataclasses.asdict(qformer) == {
            "in_dim": inputs,
            "out_dim": 128,
            "width": 96,
            "heads": 4,
            "mlp_dim": 256,
            "layers": 2,
            "queries": queries,
            "dropout": 0.0,
            "dtype": "float32",
        }
    assert (sizes.llama.remat, sizes.seg.query_mlp_dim, sizes.seg.low_res, sizes.seg.classes) == ("none", 128, 32, 71)


def test_sizes_are_replaced_by_name():
    cfg = tiny(lora={"heads": 5, "rank": None}, clip={"taps": [1, 2, 3]}, llama={})
    assert (cfg.lora.heads, cfg.lora.rank, cfg.clip.taps) == (5, 8, (1, 2, 3))
    assert dataclasses.replace(cfg, lora=tiny().lora, clip=tiny().clip) == tiny()
    assert crab_7b(lora={"heads": 1}).lora.heads == 1


@pytest.mark.parametrize(
    ("sizes", "key", "problem"),
    [
        ({"lora": {"ranks": 5}}, "lora.ranks", "is no size"),
        ({"lora": 5}, "lora", "is no size"),
        ({"lora": {"rank": {"a": 1}}}, "lora.rank", "is no size"),
        ({"lora": {"rank": 0}}, "lora.rank", "is 0"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout", "is 1.0"),
        ({"clip": {"heads": 3}}, "clip.heads", "3 does not divide sizes.clip.width = 128"),
        ({"beats": {"heads": 5}}, "beats.heads", "5 does not divide sizes.beats.width = 96"),
        ({"beats": {"conv_pos_groups": 5}}, "beats.conv_pos_groups", "5 does not divide sizes.beats.width = 96"),
        ({"visual": {"heads": 5}}, "visual.heads", "5 does not divide sizes.visual.width = 96"),
        ({"audio": {"heads": 5}}, "audio.heads", "5 does not divide sizes.audio.width = 96"),
        ({"llama": {"heads": 3, "kv_heads": 3}}, "llama.heads", "3 does not divide sizes.llama.hidden = 128"),
        ({"llama": {"kv_heads": 3}}, "llama.kv_heads", "3 does not divide sizes.llama.heads = 4"),
        ({"seg": {"grid": 9}}, "seg.grid", "is 9, and sizes.clip.image_size / clip.patch_size is 8"),
        ({"seg": {"image_size": 65}}, "seg.image_size", "is 65, and sizes.clip.image_size is 64"),
        ({"seg": {"image_dim": 64}}, "seg.image_dim", "is 64, and sizes.clip.width is 128"),
        ({"seg": {"llm_dim": 64}}, "seg.llm_dim", "is 64, and sizes.llama.hidden is 128"),
        ({"visual": {"in_dim": 64}}, "visual.in_dim", "is 64, and sizes.clip.width is 128"),
        ({"audio": {"in_dim": 64}}, "audio.in_dim", "is 64, and sizes.beats.width is 96"),
        ({"visual": {"out_dim": 64}}, "visual.out_dim", "is 64, and sizes.llama.hidden is 128"),
        ({"audio": {"out_dim": 64}}, "audio.out_dim", "is 64, and sizes.llama.hidden is 128"),
        ({"lora": {"rank": 129}}, "lora.rank", "is 129, more than sizes.llama.hidden = 128"),
        ({"llama": {"heads": 128}}, "llama.heads", "a head has 1 channels"),
        ({"beats": {"num_buckets": 33}}, "beats.num_buckets", "is 33"),
        ({"beats": {"max_distance": 80}}, "beats.max_distance", "is 80"),
        ({"clip": {"taps": (1, 2)}}, "clip.taps", "has 2 layers"),
    ],
)
def test_sizes_that_do_not_exist_or_fit_are_refused_by_name(sizes, key, problem):
    with pytest.raises(InputError) as error:
        tiny(**sizes)
    assert (error.value.field, error.value.problem) == (f"sizes.{key}", problem)


def test_sizes_at_the_edge_of_what_fits():
    for sizes in (
        {"lora": {"rank": 128}},
        {"llama": {"heads": 64}},  # heads of two channels
        {"llama": {"kv_heads": 2}},
        {"beats": {"max_distance": 81}},  # more than a quarter of 320 buckets
        {"beats": {"num_buckets": 34}},
        {"clip": {"taps": (1, 2, 2)}},
    ):
        tiny(**sizes)


@pytest.mark.parametrize(
    ("module", "field", "inside", "outside"),
    [
        ("clip", "width", (1, 2**20), (0, 2**20 + 1)),
        ("llama", "layers", (1, 1024), (0, 1025)),
        ("seg", "depth", (1, 1024), (0, 1025)),
        ("seg", "query_layers", (1, 1024), (0, 1025)),
        ("beats", "num_buckets", (4, 2**20), (3, 2**20 + 1)),
        ("clip", "dtype", ("float32", "bfloat16", "float16"), ("int8", "float64")),
        ("clip", "taps", ((0, 1024),), ((-1,), (1025,))),
        ("llama", "vocab_size", (18, 2**24), (17, 2**24 + 1)),  # 17 tokens of Crab and one other
        ("llama", "rope_theta", (1.0, 1e12), (0.5, 1e13)),
        ("llama", "rms_eps", (1e-30, 1.0), (0.0, 2.0)),
        ("llama", "remat", ("auto", "none", "full", "dots", "attention", "projections", "offload"), ("some",)),
        ("llama", "attention", ("auto", "splash", "cudnn", "einsum"), ("flash",)),
        ("lora", "dropout_bits", ("hash", "threefry"), ("rbg",)),
        ("lora", "dropout", (0.0, 0.99), (-0.1, 1.0)),
        ("lora", "alpha", (1e-9, 1e9), (0.0, 1e10)),
        ("seg", "scales", (2,), (1, 3)),
        ("seg", "tokens_per_scale", (3,), (2, 4)),
        ("seg", "classes", (71, 2**16), (70, 2**16 + 1)),
        ("beats", "patch_size", (1, 98), (0, 99)),  # a second of sound has 98 frames
        ("clip", "patch_size", (1, 2**20), (0,)),
        ("llama", "qkv_bias", (True, False), (2, "yes")),
    ],
)
def test_the_bounds_of_a_size(module, field, inside, outside):
    assert [value for value in inside if bound_of(module, field).problem(value)] == []
    assert [value for value in outside if not bound_of(module, field).problem(value)] == []


def test_every_whole_number_among_the_sizes_is_bounded():
    cfg = crab_7b()
    for module in ("clip", "beats", "visual", "audio", "llama", "lora", "seg"):
        for field, value in dataclasses.asdict(getattr(cfg, module)).items():
            if not isinstance(value, bool):
                assert f"{module}.{field}" in BOUNDS or field in BOUNDS
                assert not bound_of(module, field).problem(value)
