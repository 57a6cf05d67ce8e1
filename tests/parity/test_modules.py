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
        data.close(state, z[f"hidden_states.{i}"][:, 1:], "clip")
    for tap in model.cfg.clip.taps:
        data.close(states[tap], z[f"tap.{tap}"].reshape(states[tap].shape), f"clip.tap.{tap}")


def test_beats_at_every_length(data, load):
    model, params = load("ntp")
    z = data.arrays("beats.npz")
    cfg = model.cfg.beats
    np.testing.assert_array_equal(relative_bucket(z["rel_positions"], cfg.num_buckets, cfg.max_distance),
                                  z["rel_bucket"])
    outs = {name.removesuffix(".fbank"): run(Beats(cfg), params["beats"], z[name]) for name in z
            if name.endswith(".fbank")}
    assert {f"beats.{length}" for length in outs} >= {n for n in data.manifest["fp32_noise"] if n.startswith("beats.")}
    for length, out in outs.items():
        data.close(out, z[f"{length}.out"], f"beats.{length}")
    if "4d.out" in z:  # clips of windows; each window is a row of the two-second batch
        for window in z["4d.out"].reshape(-1, *outs["2s"].shape[1:]):
            nearest = min(outs["2s"], key=lambda row: float(np.abs(row - window).max()))
            data.close(nearest, window, "beats.2s")


def test_q_formers(qformer_case, data, load):
    """Frames and windows fold into the batch: [B, T*N, C] or [B, T, N, C] -> [B, T*Q, D]."""
    model, params = load("ntp")
    kind = qformer_case.split("_")[0]
    cfg = getattr(model.cfg, kind)
    z = data.arrays("qformer.npz", f"{qformer_case}.")
    groups = z["out"].shape[1] // cfg.queries
    out = run(QFormer(cfg), params["vl_projector" if kind == "visual" else "al_projector"],
              z["in"].reshape(len(z["in"]) * groups, -1, cfg.in_dim))
    data.close(out.reshape(z["out"].shape), z["out"], f"qformer.{qformer_case}")


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
    """Of a semantic sample every tenth class and the best one are stored."""
    z = data.arrays("seg.npz")
    expected = data.arrays("seg.npz", f"{state}.pred_masks.")
    model, params = load(state)
    binary, semantic = run(SegModule(model.cfg.seg), params["seg_module"], z["pred_embeddings"],
                           (z["image_features.0"], z["image_features.1"]))
    assert {int(name.split(".")[0]) for name in expected} == set(range(len(z["pred_embeddings"])))
    for name, value in expected.items():
        i, _, part = name.partition(".")
        if part == "argmax":
            np.testing.assert_array_equal(semantic[int(i)].argmax(0), value)
        elif part == "ch::10":
            data.close(semantic[int(i), ::10], value, "seg")
        else:
            data.close(binary[int(i)], value[0], "seg")
            np.testing.assert_array_equal(binary[int(i)] > 0, value[0] > 0)


def test_position_features(data, load):
    """Both levels of the mask branch, of the matrices that no released file holds."""
    z, params = data.arrays("seg.npz"), load("avs")[1]["seg_module"]
    for name, matrix in (("dense_pe", params["pe_layer"]), ("pe1_level1", params["mask_decoder"]["pe1"])):
        channels, side, _ = z[name].shape[-3:]
        found = FourierPosition(channels).apply({"params": matrix}, side)
        data.close(found.T.reshape(z[name].shape), z[name], "seg")


def test_filter_banks(data):
    z = data.arrays("fbank.npz")
    raw = {name.removesuffix(".raw"): z[name] for name in z if name.endswith(".raw")}
    assert raw
    for name, expected in raw.items():
        data.close(fbank.log_mel(z[f"{name}.waveform"]), expected, "fbank")
    atol = data.tolerance(np.float32(1), "fbank") * max(np.abs(array).max() for array in raw.values()) / (2 * 6.55582)
    for name in z:
        if name.endswith(".norm") and name != "silence.norm":
            waveform = z[name.replace(".norm", ".waveform")]
            np.testing.assert_allclose(fbank.fbank(waveform), z[name], rtol=0, atol=atol, err_msg=name)
    np.testing.assert_allclose(fbank.povey_window(), z["povey_window"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fbank.mel_banks()[:-1].T, z["mel_banks"], rtol=0, atol=1e-4)
    silent = fbank.fbank(np.zeros(fbank.samples_of(len(z["silence.norm"]))))
    data.close(silent, z["silence.norm"], "fbank")
