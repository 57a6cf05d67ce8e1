"""Every module of the imported model, module by module, on the inputs that the reference was given."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert.verify import text_logits
from crab_jax.models import beats, qformer
from crab_jax.models.beats import Beats, relative_bucket
from crab_jax.models.clip import Clip
from crab_jax.models.llama import Llama
from crab_jax.models.lora import LoraConfig, LoraDense
from crab_jax.models.mask_decoder import FourierPosition, SegModule
from crab_jax.models.qformer import QFormer
from data_pipelines import fbank


def run(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def test_clip_taps_and_hidden_states(data, load):
    model, params = load("ntp")
    z = data.arrays("clip.npz")
    cfg = dataclasses.replace(model.cfg.clip, taps=tuple(range(model.cfg.clip.layers + 1)))
    states = run(Clip(cfg), params["clip"], z["pixel_values"].transpose(0, 2, 3, 1))
    assert len(states) == sum(name.startswith("hidden_states.") for name in z)
    for i, state in enumerate(states):
        data.close(state, z[f"hidden_states.{i}"][:, 1:], "clip.hidden_states")
    if "last_hidden_state" in z:
        data.close(states[-1], z["last_hidden_state"][:, 1:], "clip.last_hidden_state")
    for tap in model.cfg.clip.taps:
        data.close(states[tap], z[f"tap.{tap}"].reshape(states[tap].shape), f"clip.tap.{tap}")


def test_beats_at_every_length(data, load):
    model, params = load("ntp")
    z = data.arrays("beats.npz")
    cfg = model.cfg.beats
    np.testing.assert_array_equal(
        relative_bucket(z["rel_positions"], cfg.num_buckets, cfg.max_distance), z["rel_bucket"]
    )
    outs = {
        name.removesuffix(".fbank"): run(Beats(cfg), params["beats"], z[name]) for name in z if name.endswith(".fbank")
    }
    assert {f"beats.{length}" for length in outs} >= {n for n in data.manifest["fp32_noise"] if n.startswith("beats.")}
    for length, out in outs.items():
        data.close(out, z[f"{length}.out"], f"beats.{length}")
    if "4d.out" in z:  # clips of windows; each window is a row of the two-second batch
        for window in z["4d.out"].reshape(-1, *outs["2s"].shape[1:]):
            nearest = min(outs["2s"], key=lambda row: float(np.abs(row - window).max()))
            data.close(nearest, window, "beats.2s")


def inside(module, params, *args, **static):
    """What every submodule gave: {name: {"__call__": (output of each call)}}, nested."""
    return jax.jit(
        lambda params, *args: module.apply(
            {"params": params}, *args, **static, capture_intermediates=True, mutable=["intermediates"]
        )
    )(params, *args)[1]["intermediates"]


def layer_by_layer(layer, params, x, *args):
    """The output of every layer of a stack of `layer` modules."""
    apply = jax.jit(lambda params, x: layer.apply({"params": params}, x, *args)[0])
    for i in range(layer.cfg.layers):
        x = apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
        yield x


def test_beats_inside(data, load):
    """Patches, the input of the encoder, the position bias and every layer, where the directory stores them."""
    model, params = load("ntp")
    z, params, cfg = data.arrays("beats.npz"), params["beats"], model.cfg.beats
    pos_conv = params["pos_conv"]
    kernel = pos_conv["weight_v"] * (
        pos_conv["weight_g"] / jnp.linalg.norm(pos_conv["weight_v"], axis=(1, 2), keepdims=True)
    )
    data.close(kernel.transpose(2, 1, 0), z["pos_conv.effective_weight"], "beats")
    for length in [name.removesuffix(".enc_in") for name in z if name.endswith(".enc_in")]:
        seen = inside(Beats(cfg), params, z[f"{length}.fbank"])
        seen = {name: calls["__call__"][0] for name, calls in seen.items() if name != "__call__"}
        bias = seen["relative_attention_bias"].transpose(2, 0, 1)
        data.close(seen["layer_norm"], z[f"{length}.patch_ln"], f"beats.{length}")
        data.close(seen["encoder_layer_norm"], z[f"{length}.enc_in"], f"beats.{length}")
        np.testing.assert_array_equal(bias, z[f"{length}.pos_bias"])
        outs = layer_by_layer(beats.Layer(cfg), params["layers"], seen["encoder_layer_norm"], bias)
        for i, out in enumerate(outs):
            data.close(out, z[f"{length}.layer{i}"], f"beats.{length}")


def test_q_former_inside(data, load):
    """The queries after their LayerNorm, and after every layer."""
    model, params = load("ntp")
    z, params, cfg = data.arrays("qformer.npz", "visual_t1."), params["vl_projector"], model.cfg.visual
    seen = inside(QFormer(cfg), params, z["in"])
    seen = {name: seen[name]["__call__"][0] for name in ("ln", "embeddings_norm")}
    states = [
        seen["embeddings_norm"],
        *layer_by_layer(qformer.Layer(cfg), params["layers"], seen["embeddings_norm"], seen["ln"], None),
    ]
    assert len(states) == sum(name.startswith("bert_hidden.") for name in z)
    for i, state in enumerate(states):
        data.close(state, z[f"bert_hidden.{i}"], "qformer.visual_t1")


def test_q_formers(qformer_case, data, load):
    """Frames and windows fold into the batch: [B, T*N, C] or [B, T, N, C] -> [B, T*Q, D]."""
    model, params = load("ntp")
    kind = qformer_case.split("_")[0]
    cfg = getattr(model.cfg, kind)
    z = data.arrays("qformer.npz", f"{qformer_case}.")
    groups = z["out"].shape[1] // cfg.queries
    out = run(
        QFormer(cfg),
        params["vl_projector" if kind == "visual" else "al_projector"],
        z["in"].reshape(len(z["in"]) * groups, -1, cfg.in_dim),
    )
    data.close(out.reshape(z["out"].shape), z["out"], f"qformer.{qformer_case}")


def test_one_lora_linear_and_its_router(data, load):
    z = data.arrays("lora.npz")
    heads = sum(name.startswith("w.lora_B") for name in z)
    rank = z["w.lora_A.weight"].shape[0]
    lora = LoraConfig(rank=rank, alpha=float(z["scaling"]) * rank, heads=heads, dropout=0.0)
    params = {
        "kernel": z["w.weight"].T,
        "lora_A": z["w.lora_A.weight"].T,
        "lora_route": z["w.lora_route.weight"].T,
        "lora_B": np.stack([z[f"w.lora_B{i}.weight"].T for i in range(heads)]),
    }
    y, state = LoraDense(len(z["w.weight"]), lora).apply({"params": params}, z["x"], mutable=["router"])
    data.close(y, z["y"], "llama")
    data.close(state["router"]["weights"][0], z["route_weight"], "llama")
    plain = LoraDense(len(z["w.weight"]), None).apply({"params": {"kernel": params["kernel"]}}, z["x"])
    data.close(plain, z["base_only"], "llama")

    model, trained = load("ntp")
    gate = jax.tree.map(lambda leaf: leaf[0], trained["llama"]["layers"]["mlp"]["gate_proj"])
    y, state = LoraDense(z["gate0.y"].shape[-1], model.cfg.lora).apply(
        {"params": gate}, z["gate0.x"], mutable=["router"]
    )
    data.close(y, z["gate0.y"], "llama")
    data.close(state["router"]["weights"][0], z["gate0.route_weight"], "llama")


def without_lora(params):
    return (
        {k: without_lora(v) for k, v in params.items() if not k.startswith("lora_")}
        if isinstance(params, dict)
        else params
    )


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
        tokens = tokens[mask.all(-1)][: len(z["lora_nomask.logits"])]
        mask, positions = np.ones_like(tokens, bool), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    apply = jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=text_logits, mutable=["intermediates"]))
    logits, sown = apply(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask))
    expected = z[f"{prefix}.logits"]
    data.close(logits[..., : expected.shape[2]][mask], expected[mask], "llama")
    states = [
        params["llama"]["embed_tokens"]["embedding"][tokens],
        *sown["intermediates"]["llama"]["layers"]["hidden"][0],
    ]
    llama = Llama(model.cfg.llama, model.cfg.lora).bind({"params": params["llama"]})
    states[-1] = llama.norm(states[-1])
    for i, state in enumerate(states):
        data.close(state[mask], z[f"{prefix}.hidden_states.{i}"][mask], "llama")
    if prefix == "lora":
        labels = z["labels"][:, 1:]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), np.maximum(labels, 0)[..., None], -1)[..., 0]
        data.close(-picked[labels != -100].mean(), z["lora.loss"], "llama")


@pytest.mark.parametrize("state", ["avs", "avss"])
def test_masks_of_both_kinds(state, data, seg_masks):
    """Of a semantic sample every tenth class and the best one are stored."""
    expected = data.arrays("seg.npz", f"{state}.pred_masks.")
    binary, semantic = seg_masks(state)
    assert {int(name.split(".")[0]) for name in expected} == set(range(len(binary)))
    for name, value in expected.items():
        i, _, part = name.partition(".")
        if part == "argmax":
            np.testing.assert_array_equal(semantic[int(i)].argmax(0), value)
        elif part == "ch::10":
            data.close(semantic[int(i), ::10], value, f"seg.pred_masks.{i}")
        else:
            data.close(binary[int(i)], value[0], f"seg.pred_masks.{i}")
            np.testing.assert_array_equal(binary[int(i)] > 0, value[0] > 0)


def test_the_mask_branch_inside(data, load):
    """Everything between the states of the first sample and its masks; the decoder works at two levels."""
    model, params = load("avs")
    z = data.arrays("seg.npz")
    states, *features = (z[name][:1] for name in ("pred_embeddings", "image_features.0", "image_features.1"))
    outer = inside(SegModule(model.cfg.seg), params["seg_module"], states, tuple(features), kinds=("binary",))
    inner = outer["mask_decoder"]
    data.close(outer["text_hidden_fcs"]["__call__"][0][0], z["sample0.text_hidden"], "seg")
    data.close(outer["image_feature_neck"]["__call__"][0].transpose(0, 3, 1, 2), z["sample0.neck"], "seg")
    compared = 2
    for name, expected in z.items():
        found = re.fullmatch(r"sample0\.(?:mask_decoder\.)?(?:(.+)\.)?level(\d)", name)
        if found:
            module, level = found[1] or "ms3_s4_classifier", int(found[2])
            calls = inner[module]["__call__"]
            value = calls[level if len(calls) > 1 else 0]  # the input is upsampled for the second level only
            data.close(value if value.ndim == 3 else value.transpose(0, 3, 1, 2), expected, "seg")
            compared += 1
    assert compared == sum(name.startswith("sample0.") for name in z)


def test_position_features(data, load):
    """Both levels of the mask branch, of the matrices that no released file holds."""
    z, params = data.arrays("seg.npz"), load("avs")[1]["seg_module"]
    for name, matrix in (("dense_pe", params["pe_layer"]), ("pe1_level1", params["mask_decoder"]["pe1"])):
        channels, side, _ = z[name].shape[-3:]
        found = FourierPosition(channels).apply({"params": matrix}, side)
        data.close(found.T.reshape(z[name].shape), z[name], "seg")


def test_filter_banks(data):
    """Log energies and normalised ones. Windows that the reference pads are float64 there, so those are its numbers;
    what it would have got in float32 is stored too, and no further away."""
    z = data.arrays("fbank.npz")
    names = [name for name in z if name.endswith((".raw", ".norm", ".norm_if_float32")) and name != "silence.norm"]
    assert any(name.endswith(".raw") for name in names)
    for name in names:
        window, kind = name.split(".")
        waveform = z[f"{window}.waveform"]
        if kind == "raw":
            data.close(fbank.log_mel(waveform), z[name], f"fbank.{name}")
        else:
            data.close_fbank(fbank.fbank(waveform), z[name], window)
    silent = fbank.fbank(np.zeros(fbank.samples_of(len(z["silence.norm"]))))
    data.close_fbank(silent, z["silence.norm"], "silence")
    np.testing.assert_allclose(fbank.povey_window(), z["povey_window"], rtol=0, atol=1e-6)
    # The reference's triangles, at most 1 high, are float32 differences of mels up to 2840.
    np.testing.assert_allclose(fbank.mel_banks()[:-1].T, z["mel_banks"], rtol=0, atol=2e-5)
