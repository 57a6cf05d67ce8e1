"""Independent oracles: Hugging Face's own models at real width, forward and backward, on random weights; and PyTorch
itself as the reader of what we export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file, torch_writer
from crab_jax.convert.encoders import clip_config, clip_rules
from crab_jax.convert.exporting import export
from crab_jax.convert.keymap import from_params, to_params
from crab_jax.convert.llama import llama_config, llama_rules, pad_vocab, trim_vocab
from crab_jax.models.clip import Clip
from crab_jax.models.llama import Llama
from tests.golden import make

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


def test_golden_arrays_are_what_pytorch_and_hugging_face_compute(golden):
    assert make.rerun(golden, None)


def test_clip_vit_l_14():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
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
            np.testing.assert_allclose(
                value,
                expected_grads[name],
                rtol=0,
                err_msg=name,
                atol=1e-3 * max(float(np.abs(expected_grads[name]).max()), 1e-3 * largest),
            )


def test_llama_7b_width():
    """Two layers of LLaMA-2-7B; the vocabulary is cut, since it adds memory and no arithmetic of its own."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=512,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    oracle = transformers.LlamaForCausalLM(config).eval()
    cfg = llama_config(config.to_dict(), dtype="float32", remat="none")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (2, 24))
    mask = np.ones((2, 24), bool)
    mask[1, :7] = False  # left padding
    weight = (rng.normal(size=(2, 24, 512)) * mask[..., None]).astype(np.float32)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)

    expected = oracle(
        torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        position_ids=torch.from_numpy(positions),
    ).logits
    (expected * torch.from_numpy(weight)).sum().backward()
    rules = llama_rules(cfg)
    params = pad_vocab(to_params(rules, tensors(oracle)), cfg)
    model = Llama(cfg)

    def logits(llama):
        hidden, _ = llama(llama.embed(jnp.asarray(tokens)), jnp.asarray(positions), jnp.asarray(mask))
        return llama.logits(hidden)[..., : cfg.vocab_size]

    @jax.jit
    def run(params):
        found, back = jax.vjp(lambda p: model.apply({"params": p}, method=logits), params)
        return found, back(jnp.asarray(weight))[0]

    found, grads = run(params)
    close(np.asarray(found)[mask], expected.detach().numpy()[mask], 1e-4)
    theirs = gradients(oracle)
    for name, value in from_params(rules, trim_vocab(grads, cfg.vocab_size)).items():
        close(value, theirs[name], 1e-3, name)


def same(tensor, array: np.ndarray) -> bool:
    """Equal shape, dtype and values."""
    exact = tensor.float() if array.dtype == jnp.bfloat16 else tensor  # PyTorch has no way to NumPy for bfloat16
    return str(tensor.dtype) == f"torch.{array.dtype.name}" and np.array_equal(
        exact.numpy(), array.astype(exact.numpy().dtype)
    )


def test_torch_loads_what_we_export(data, checkpoint, tmp_path):
    """With `weights_only=True`, memory-mapped or not; tensors that were imported come back as PyTorch wrote them."""
    files = [*export(checkpoint("avs"), "crab", tmp_path / "crab"), *export(checkpoint("avs"), "hf", tmp_path / "hf")]
    files = [path for path in files if path.suffix in (".bin", ".pt")]
    assert len(files) == 6
    for path in files:
        ours = torch_file.read(path)
        for mmap in (False, True):
            theirs = torch.load(path, weights_only=True, mmap=mmap)
            nested = theirs if path.suffix == ".bin" else {f"model.{k}": v for k, v in theirs["model"].items()}
            assert list(nested) == list(ours), path.name
            assert all(same(nested[name], ours[name]) for name in ours), path.name
        original = data.folder / "weights/crab" / path.name
        if original.exists() and "pretrain" not in path.name:  # those are of an earlier stage of training
            released = torch.load(original, weights_only=True)
            assert {name for name in nested if name not in released} <= {n for n in nested if "positional" in n}
            for name in set(nested) & set(released):
                assert torch.equal(nested[name], released[name]), name
    assert theirs["cfg"]["encoder_layers"] == data.manifest["config"]["beats"]["encoder_layers"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int64", "bool"])
def test_torch_loads_every_dtype_and_shape(dtype, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        name: (4 * rng.normal(size=shape)).astype(int).astype(jnp.dtype(dtype))
        for name, shape in (("matrix", (3, 5)), ("scalar", ()), ("empty", (0, 4)))
    }
    torch_writer.save(
        tmp_path / "x.bin",
        {
            "nested": {name: torch_writer.Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()},
            "rate": 2.5,
            "on": True,
        },
    )
    theirs = torch.load(tmp_path / "x.bin", weights_only=True)
    assert all(same(theirs["nested"][name], array) for name, array in arrays.items())
    assert (theirs["rate"], theirs["on"]) == (2.5, True)
