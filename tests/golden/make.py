"""Make the golden arrays again, as far as this can be done without the machine that made them; see README.md.

    python tests/golden/make.py subset --whole DIR --out DIR     the committed files, from a whole golden directory
    python tests/golden/make.py rerun --golden DIR               arrays of CLIP, LLaMA, LoRA and the losses, by PyTorch
    python tests/golden/make.py rerun --golden DIR --kaldi FILE  filter banks as well, by kaldi.py of torchaudio

`rerun` computes the outputs from the inputs and weights of the directory, says how far they are from its arrays, and
exits with 1 if one is further away than the rounding of float32. It needs PyTorch, transformers and safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROUNDING = 2e-5  # of the largest value of an array; filter banks lose more, see `fbank`
Compared = Iterator[tuple[str, Any, np.ndarray, float]]  # name, what is computed now, what is stored, tolerance


def subset(whole: Path, out: Path) -> None:
    """Copy a golden directory without what `omitted.json` beside this file leaves out, and what describes it."""
    omitted = json.loads((Path(__file__).parent / "omitted.json").read_text())
    for file in sorted(path for path in whole.rglob("*") if path.is_file()):
        name = file.relative_to(whole).as_posix()
        if name in omitted["files"] or name == "README.md":
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        left_out = set(omitted["arrays"].get(name, ()))
        if file.suffix == ".npz" and file.parent == whole:
            with np.load(file) as arrays:
                np.savez_compressed(target, **{key: arrays[key] for key in arrays.files if key not in left_out})
        elif name in ("manifest.json", "train_step.json"):
            record = json.loads(file.read_text())
            for weights in omitted["files"]:
                record.get("weight_keys", {}).pop(Path(weights).name, None)
            record.pop("avss_mix", None)
            record.get("ntp", {}).pop("param_grad_norm", None)
            target.write_text(json.dumps(record, separators=(",", ":")))
        else:
            shutil.copyfile(file, target)


def clip(golden: Path) -> Compared:
    """CLIP's hidden states and taps, by transformers."""
    import torch
    import transformers

    stored, manifest = np.load(golden / "clip.npz"), json.loads((golden / "manifest.json").read_text())
    model = transformers.CLIPVisionModel.from_pretrained(
        golden / "weights" / "clip", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        states = model(torch.from_numpy(stored["pixel_values"]), output_hidden_states=True).hidden_states
    for number, state in enumerate(states):
        yield f"clip hidden_states.{number}", state, stored[f"hidden_states.{number}"], ROUNDING
    for tap in manifest["config"]["select_layer_list"]:
        width = states[tap].shape[-1]
        yield f"clip tap.{tap}", states[tap][:, 1:].reshape(1, -1, width), stored[f"tap.{tap}"], ROUNDING


def released_lora(golden: Path, model: Any) -> None:
    """Give every projection of a LLaMA its LoRA: y = W x + alpha / r * sum over heads of softmax(R x)_h B_h A x."""
    import torch

    weights = torch.load(golden / "weights" / "crab" / "finetune_weights.bin", map_location="cpu", weights_only=True)
    lora = json.loads((golden / "manifest.json").read_text())["config"]["lora"]
    prefix, scaling = "base_model.model.model.layers.", lora["lora_alpha"] / lora["r"]

    def mixed(name: str) -> Any:
        route, down = weights[f"{name}.lora_route.weight"], weights[f"{name}.lora_A.weight"]
        heads = [weights[f"{name}.lora_B{number}.weight"] for number in range(lora["lora_nums"])]

        def hook(_: Any, inputs: Any, output: Any) -> Any:
            (x,) = inputs
            mix = torch.softmax(x @ route.T, -1, dtype=torch.float32)
            low = x @ down.T
            return output + scaling * sum(mix[..., i : i + 1] * (low @ head.T) for i, head in enumerate(heads))

        return hook

    for name, module in model.model.layers.named_modules():
        if f"{prefix}{name}.lora_route.weight" in weights:
            module.register_forward_hook(mixed(f"{prefix}{name}"))


def llama(golden: Path) -> Compared:
    """LLaMA's logits and hidden states without and with LoRA, by transformers; padded positions are left out."""
    import torch
    import transformers

    stored = np.load(golden / "llama.npz")
    unsaved = np.load(golden / "weights" / "crab" / "unsaved_state.npz")
    model = transformers.LlamaForCausalLM.from_pretrained(
        golden / "weights" / "llama", attn_implementation="eager", dtype=torch.float32
    ).eval()
    mask = stored["attention_mask"].astype(bool)
    inputs = {name: torch.from_numpy(stored[name]) for name in ("attention_mask", "position_ids")}
    with torch.no_grad():
        out = model(torch.from_numpy(stored["base.input_ids"]), **inputs, output_hidden_states=True)
        yield "llama base.logits", out.logits[mask], stored["base.logits"][mask], ROUNDING
        for number, state in enumerate(out.hidden_states):
            yield (
                f"llama base.hidden_states.{number}",
                state[mask],
                stored[f"base.hidden_states.{number}"][mask],
                ROUNDING,
            )
        for layer, name in ((model.model.embed_tokens, "embed_tokens"), (model.lm_head, "lm_head")):
            rows = torch.from_numpy(unsaved[f"{name}.new_rows"])
            layer.weight = torch.nn.Parameter(torch.cat([layer.weight.data, rows.to(layer.weight.dtype)]))
        released_lora(golden, model)
        out = model(torch.from_numpy(stored["input_ids"]), **inputs, output_hidden_states=True)
    yield "llama lora.logits", out.logits[mask], stored["lora.logits"][mask], ROUNDING
    for number, state in enumerate(out.hidden_states):
        yield f"llama lora.hidden_states.{number}", state[mask], stored[f"lora.hidden_states.{number}"][mask], ROUNDING
    labels = torch.from_numpy(stored["labels"])
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    yield "llama lora.loss", loss, stored["lora.loss"], ROUNDING


def lora(golden: Path) -> Compared:
    """One LoRA layer and its router."""
    import torch

    stored = {name: torch.from_numpy(value) for name, value in np.load(golden / "lora.npz").items()}
    x, w = stored["x"], stored["w.weight"]
    mix, low = torch.softmax(x @ stored["w.lora_route.weight"].T, -1), x @ stored["w.lora_A.weight"].T
    heads = sorted(name for name in stored if name.startswith("w.lora_B"))
    added = sum(mix[..., i : i + 1] * (low @ stored[name].T) for i, name in enumerate(heads))
    yield "lora route_weight", mix, stored["route_weight"].numpy(), ROUNDING
    yield "lora base_only", x @ w.T, stored["base_only"].numpy(), ROUNDING
    yield "lora y", x @ w.T + stored["scaling"] * added, stored["y"].numpy(), ROUNDING


def losses(golden: Path) -> Compared:
    """The terms of the loss, as the released code states them, by PyTorch."""
    import torch
    from torch.nn import functional

    stored = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(golden / "losses.npz").items()}

    def dice(logits: Any, truth: Any) -> Any:
        s, y = logits.sigmoid().flatten(1), truth.flatten(1)
        ratio = (2 * (s / 1000 * y).sum(-1) + 1e-6) / ((s / 1000).sum(-1) + (y / 1000).sum(-1) + 1e-6)
        return ((1 - ratio).sum() / (len(logits) + 1e-8)).float()

    logits, truth = stored["bin.logits"], stored["bin.gt"].float()
    for name, mask in (("", truth), ("_empty", torch.zeros_like(truth))):
        bce = functional.binary_cross_entropy_with_logits(logits, mask)
        yield f"losses bce{name}", bce, stored[f"bce{name}"].numpy(), ROUNDING
        yield f"losses dice{name}", dice(logits, mask), stored[f"dice{name}"].numpy(), ROUNDING
    classes = functional.cross_entropy(stored["cls.logits"][None], stored["cls.gt"].long())
    yield "losses avss_ce", classes, stored["avss_ce"].numpy(), ROUNDING
    text, labels = stored["text.logits"][:, :-1].flatten(0, 1), stored["text.labels"][:, 1:].flatten()
    yield (
        "losses text.ce",
        functional.cross_entropy(text, labels, ignore_index=-100),
        stored["text.ce"].numpy(),
        ROUNDING,
    )


def fbank(golden: Path, kaldi: Path) -> Compared:
    """Filter banks by torchaudio's own file, which needs nothing else of torchaudio."""
    import torch

    for name in ("torchaudio", "torchaudio._internal", "torchaudio._internal.module_utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location("kaldi", kaldi)
    if spec is None or spec.loader is None:
        sys.exit(f"{kaldi} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = np.load(golden / "fbank.npz")
    for name in sorted(key.removesuffix(".raw") for key in stored.files if key.endswith(".raw")):
        if f"{name}.waveform" in stored.files:
            sound = torch.from_numpy(stored[f"{name}.waveform"])[None] * 2**15
            bands = module.fbank(sound, num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10)
            yield f"fbank {name}.raw", bands, stored[f"{name}.raw"], 1e-4


def rerun(golden: Path, kaldi: Path | None) -> bool:
    """Print how far computed arrays are from the stored ones; return whether all are within rounding."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    parts = [clip(golden), llama(golden), lora(golden), losses(golden), *([fbank(golden, kaldi)] if kaldi else [])]
    good = True
    for part in parts:
        for name, value, stored, tolerance in part:
            computed = np.asarray(value.detach().numpy() if hasattr(value, "detach") else value)
            scale = max(float(np.abs(stored).max()), 1e-30)
            error = float(np.abs(computed - stored).max()) / scale
            good &= error <= tolerance and computed.shape == stored.shape
            print(f"{'same ' if not error else 'close' if error <= tolerance else 'OTHER'}  {error:.1e}  {name}")
    return good


def main() -> None:
    """Run one of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    copy, compute = commands.add_parser("subset"), commands.add_parser("rerun")
    copy.add_argument("--whole", type=Path, required=True)
    copy.add_argument("--out", type=Path, required=True)
    compute.add_argument("--golden", type=Path, default=Path(__file__).parent)
    compute.add_argument("--kaldi", type=Path, help="torchaudio/compliance/kaldi.py")
    args = parser.parse_args()
    if args.command == "subset":
        subset(args.whole, args.out)
    elif not rerun(args.golden, args.kaldi):
        sys.exit(1)


if __name__ == "__main__":
    main()
