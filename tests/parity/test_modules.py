"""Every module of the imported model, module by module, on the inputs that the reference was given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert.verify import text_logits
from crab_jax.models.beats import Beats, relative_bucket
from crab_jax.models.clip import Clip
from crab_jax.models.llama import Llama
from crab_jax.models.lora import LoraConfig, LoraDense
from crab_jax.models.mask_decoder import SegModule
from crab_jax.models.qformer import QFormer
from data_pipelines import fbank


def run(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def test_clip_taps_and_hidden_states(data, load):
    model, params = load("ntp")
    z = data.arrays("clip.npz")
    cfg = dataclasses.replace(model.cfg.clip, taps=tuple(range(model.cfg.clip.layers + 1)))
    states = run(Clip(cfg), params["clip"], z["pixel_values"].transpose(0, 2, 3, 1))
    for i, state in enumerate(states):
        data.close(state, z[f"hidden_states.{i}"][:, 1:], "clip")
    for tap in model.cfg.clip.taps:
        data.close(states[tap], z[f"tap.{tap}"].reshape(states[tap].shape), f"clip.tap.{tap}")


def test_beats_at_every_length(data, load):
    model, params = load("ntp")
    z = data.arrays("beats.npz")
    cfg = model.cfg.beats
    np.testing.assert_array_equal(relative_bucket(z["rel_positions"], cfg.num_buckets, cfg.max_distance),
                                  z["rel_bucket"])
    lengths = [name.removesuffix(".fbank") for name in z if name.endswith(".fbank")]
    assert len(lengths) == sum(name.startswith("beats.") for name in data.manifest["fp32_noise"])
    for length in lengths:
        data.close(run(Beats(cfg), params["beats"], z[f"{length}.fbank"]), z[f"{length}.out"], f"beats.{length}")


@pytest.mark.parametrize("name", ["visual_t1", "visual_t3", "audio_3d", "audio_4d"])
def test_q_formers(name, data, load):
    """Frames and windows fold into the batch: [B, T*N, C] or [B, T, N, C] -> [B, T*Q, D]."""
    model, params = load("ntp")
    kind = name.split("_")[0]
    cfg = getattr(model.cfg, kind)
    z = data.arrays("qformer.npz", f"{name}.")
    groups = z["out"].shape[1] // cfg.queries
    out = run(QFormer(cfg), params["vl_projector" if kind == "visual" else "al_projector"],
              z["in"].reshape(len(z["in"]) * groups, -1, cfg.in_dim))
    data.close(out.reshape(z["out"].shape), z["out"], f"qformer.{name}")


def test_one_lora_linear_and_its_router(data, load):
    z = data.arrays("lora.npz")
    heads = sum(name.startswith("w.lora_B") for name in z)
    rank = z["w.lora_A.weight"].shape[0]
    lora = LoraConfig(rank=rank, alpha=float(z["scaling"]) * rank, heads=heads, dropout=0.0)
    params = {"kernel": z["w.weight"].T, "lora_A": z["w.lora_A.weight"].T, "lora_route": z["w.lora_route.weight"].T,
              "lora_B": np.stack([z[f"w.lora_B{i}.weight"].T for i in range(heads)])}
    y, state = LoraDense(len(z["w.weight"]), lora).apply({"params": params}, z["x"], mutable=["router"])
    data.close(y, z["y"], "llama")
    data.close(state["router"]["weights"][0], z["route_weight"], "llama")
    plain = LoraDense(len(z["w.weight"]), None).apply({"params": {"kernel": params["kernel"]}}, z["x"])
    data.close(plain, z["base_only"], "llama")

    model, trained = load("ntp")
    gate = jax.tree.map(lambda leaf: leaf[0], trained["llama"]["layers"]["mlp"]["gate_proj"])
    y, state = LoraDense(z["gate0.y"].shape[-1], model.cfg.lora).apply({"params": gate}, z["gate0.x"],
                                                                      mutable=["router"])
    data.close(y, z["gate0.y"], "llama")
    data.close(state["router"]["weights"][0], z["gate0.route_weight"], "llama")


def without_lora(params):
    return {k: without_lora(v) for k, v in params.items() if not k.startswith("lora_")} if isinstance(params, dict) \
        else params


@pytest.mark.parametrize("prefix", ["base", "lora", "lora_nomask"])
def test_llama_logits_and_hidden_states(prefix, data, load):
    """Real tokens only: the reference leaves padding rows undefined."""
    model, params = load("ntp")
    z = data.arrays("llama.npz")
    tokens, mask, positions = z["input_ids"], z["attention_mask"].astype(bool), z["position_ids"]
    if prefix == "base":
        tokens = z["base.input_ids"]
        model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, lora=None))
        params = {**params, "llama": without_lora(params["llama"])}
    elif prefix == "lora_nomask":
        tokens = tokens[mask.all(-1)][:len(z["lora_nomask.logits"])]
        mask, positions = np.ones_like(tokens, bool), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    apply = jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=text_logits, mutable=["intermediates"]))
    logits, sown = apply(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask))
    expected = z[f"{prefix}.logits"]
    data.close(logits[..., :expected.shape[2]][mask], expected[mask], "llama")
    states = [params["llama"]["embed_tokens"]["embedding"][tokens],
              *sown["intermediates"]["llama"]["layers"]["hidden"][0]]
    llama = Llama(model.cfg.llama, model.cfg.lora).bind({"params": params["llama"]})
    states[-1] = llama.norm(states[-1])
    for i, state in enumerate(states):
        data.close(state[mask], z[f"{prefix}.hidden_states.{i}"][mask], "llama")
    if prefix == "lora":
        labels = z["labels"][:, 1:]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), np.maximum(labels, 0)[..., None], -1)[..., 0]
        data.close(-picked[labels != -100].mean(), z["lora.loss"], "llama")


@pytest.mark.parametrize("state", ["avs", "avss"])
def test_masks_of_both_kinds(state, data, load):
    """Sample 1 is semantic, the others are binary."""
    z = data.arrays("seg.npz")
    expected = data.arrays("seg.npz", f"{state}.pred_masks.")
    model, params = load(state)
    binary, semantic = run(SegModule(model.cfg.seg), params["seg_module"], z["pred_embeddings"],
                           (z["image_features.0"], z["image_features.1"]))
    for i in (0, 2, 3):
        data.close(binary[i], expected[str(i)][0], "seg")
        np.testing.assert_array_equal(binary[i] > 0, expected[str(i)][0] > 0)
    data.close(semantic[1, ::10], expected["1.ch::10"], "seg")
    np.testing.assert_array_equal(semantic[1].argmax(0), expected["1.argmax"])


def test_filter_banks(data):
    z = data.arrays("fbank.npz")
    raw = {name: z[f"{name}.raw"] for name in ("1s", "2s", "odd") if f"{name}.raw" in z}
    assert raw
    for name, expected in raw.items():
        data.close(fbank.log_mel(z[f"{name}.waveform"]), expected, "fbank")
    relative = data.tolerance(np.float32(1), "fbank")
    for name in ("1s", "2s", "pad_front", "pad_back"):
        if f"{name}.norm" in z:
            atol = relative * max(np.abs(array).max() for array in raw.values()) / (2 * 6.55582)
            np.testing.assert_allclose(fbank.fbank(z[f"{name}.waveform"]), z[f"{name}.norm"], rtol=0, atol=atol)
    silent = fbank.fbank(np.zeros(fbank.samples_of(len(z["silence.norm"]))))
    data.close(silent, z["silence.norm"], "fbank")
