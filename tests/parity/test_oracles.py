"""Independent oracles at real width: Hugging Face's own models, forward and backward, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert.encoders import clip_config, clip_rules
from crab_jax.convert.keymap import from_params, to_params
from crab_jax.convert.llama import llama_config, llama_rules, pad_vocab, trim_vocab
from crab_jax.models.clip import Clip
from crab_jax.models.llama import Llama

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="PyTorch is not installed; it is needed for these oracles only")
transformers = pytest.importorskip("transformers")


def close(actual, expected, relative, name=""):
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * scale, err_msg=name)


def tensors(model) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def gradients(model) -> dict[str, np.ndarray]:
    return {name: value.grad.numpy() for name, value in model.named_parameters() if value.grad is not None}


def test_clip_vit_l_14():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                           num_attention_heads=16, image_size=224, patch_size=14)
    oracle = transformers.CLIPVisionModel(config).eval()
    cfg = clip_config(config.to_dict(), (14, 22, 23), "float32")
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 3, 224, 224)).astype(np.float32)
    weights = [rng.normal(size=(1, cfg.patches, cfg.width)).astype(np.float32) for _ in cfg.taps]

    states = oracle(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
    expected = [states[tap][:, 1:] for tap in cfg.taps]
    sum((e * torch.from_numpy(w)).sum() for e, w in zip(expected, weights, strict=True)).backward()

    names = tensors(oracle)
    prefix = "" if "vision_model.embeddings.class_embedding" in names else "vision_model."
    params = to_params(clip_rules(cfg), {prefix + name: value for name, value in names.items()})

    @jax.jit
    def run(params):
        found, back = jax.vjp(lambda p: Clip(cfg).apply({"params": p}, pixels.transpose(0, 2, 3, 1)), params)
        return found, back(tuple(map(jnp.asarray, weights)))[0]

    found, grads = run(params)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs.detach().numpy(), 1e-4)
    expected_grads = {prefix + name: value for name, value in gradients(oracle).items()}
    largest = max(float(np.abs(value).max()) for value in expected_grads.values())
    for name, value in from_params(clip_rules(cfg), grads).items():
        if name in expected_grads:  # the class token of the last block gets none
            np.testing.assert_allclose(value, expected_grads[name], rtol=0, err_msg=name,
                                       atol=1e-3 * max(float(np.abs(expected_grads[name]).max()), 1e-3 * largest))


def test_llama_7b_width():
    """Two layers of LLaMA-2-7B; the vocabulary is cut, since it adds memory and no arithmetic of its own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2,
                                      num_attention_heads=32, num_key_value_heads=32, vocab_size=512,
                                      rms_norm_eps=1e-5, attn_implementation="eager")
    oracle = transformers.LlamaForCausalLM(config).eval()
    cfg = llama_config(config.to_dict(), dtype="float32", remat="none")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (2, 24))
    mask = np.ones((2, 24), bool)
    mask[1, :7] = False  # left padding
    weight = (rng.normal(size=(2, 24, 512)) * mask[..., None]).astype(np.float32)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)

    expected = oracle(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)),
                      position_ids=torch.from_numpy(positions)).logits
    (expected * torch.from_numpy(weight)).sum().backward()
    rules = llama_rules(cfg)
    params = pad_vocab(to_params(rules, tensors(oracle)), cfg)
    model = Llama(cfg)

    def logits(llama):
        hidden, _ = llama(llama.embed(jnp.asarray(tokens)), jnp.asarray(positions), jnp.asarray(mask))
        return llama.logits(hidden)[..., :cfg.vocab_size]

    @jax.jit
    def run(params):
        found, back = jax.vjp(lambda p: model.apply({"params": p}, method=logits), params)
        return found, back(jnp.asarray(weight))[0]

    found, grads = run(params)
    close(np.asarray(found)[mask], expected.detach().numpy()[mask], 1e-4)
    theirs = gradients(oracle)
    for name, value in from_params(rules, trim_vocab(grads, cfg.vocab_size)).items():
        close(value, theirs[name], 1e-3, name)
