"""Measure a training step of the joint stage next to Hugging Face transformers with LoRA on torch, on the same tokens.

    python benchmarks/train_step.py [--rows 8] [--steps 5] [--sides ours,ours-llm,peft,multihead]

On a GPU the model is crab_7b in bfloat16, elsewhere a small one in float32. All weights are random. Needs torch,
transformers and peft besides the project (`pip install torch peft`); --sides ours needs neither. The sides:

    ours        the whole step: encoders, Q-Formers, mask branch, language model, multi-head LoRA, AdamW
    ours-llm    the same step on text alone, which measures language model and LoRA
    peft        LlamaForCausalLM (SDPA, gradient checkpointing) with PEFT's LoRA, which has one head and no router
    multihead   LlamaForCausalLM with the released multi-head LoRA, a loop over the heads

Every side runs in its own process, over the same buckets with the same lengths and targets; only real tokens count, not
padding. Model FLOPs are 4 per token and weight of the language model's matrices, all of which are frozen (encoders and
LoRA are left out, so the figure of `ours` is a lower bound).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIDES = ("ours", "ours-llm", "peft", "multihead")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Dense bf16 FLOP/s (vendor's data sheets, without sparsity).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def on_gpu() -> str:
    """Return the name of the first GPU, "" without one."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return found.stdout.splitlines()[0] if found.returncode == 0 and found.stdout else ""


def run_config(gpu: str, rows: int) -> Any:
    """Return the config of the joint stage: crab_7b on a GPU, else a small width with every module."""
    from configs import finetune
    from crab_jax.config import resolve

    config = finetune.get_config()
    config.data.batch_size, config.optim.accumulate, config.mesh.fsdp = rows, 1, 1
    config.sizes.llama.remat = "full"
    if not gpu:
        config.model, config.frozen_dtype, config.data.lengths = "tiny", "float32", (144, 192, 272)
        sizes = {
            "llama": {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 4, "mlp_dim": 688},
            "visual": {"out_dim": 256},
            "audio": {"out_dim": 256},
            "seg": {"llm_dim": 256},
            "lora": {"dropout": 0.05},
        }
        for module, changes in sizes.items():
            config.sizes[module].update(changes)
    return resolve(config)


def bucket_rows(config: Any) -> list[tuple[Any, np.ndarray, int]]:
    """Return (bucket, tokens int32[B,L], real length of every row and target) of each batch.

    The buckets are those of the released tasks, with rows filled to between 70 and 100 %.
    """
    from crab_jax.compile import bucket_mix

    rng, out = np.random.default_rng(0), []
    buckets = bucket_mix(config)
    for bucket in buckets if config.model_name == "crab_7b" else (buckets[0], buckets[-1]):
        tokens = rng.integers(3, config.model.llama.vocab_size - 20, (config.mixture.batch_size, bucket.length))
        real = rng.integers(int(0.7 * bucket.length), bucket.length + 1, config.mixture.batch_size)
        out.append((bucket, tokens.astype(np.int32), real))
    return out


ANSWER = 48  # target tokens of a row, its last real positions


def timed(step: Callable[[int], float], batches: int, steps: int) -> float:
    """Return the seconds of one pass over the batches, the best of `steps`, after one pass for compilation."""
    best = float("inf")
    for number in range(steps + 1):
        began = time.perf_counter()
        for batch in range(batches):
            loss = step(batch)
            assert np.isfinite(loss), loss
        if number:
            best = min(best, time.perf_counter() - began)
    return best


def ours(gpu: str, rows: int, steps: int, text_only: bool) -> dict[str, Any]:
    """Measure the project's own step."""
    import jax
    import jax.numpy as jnp

    from crab_jax import optim
    from crab_jax.parallel import sharding
    from crab_jax.runs import run_mesh, run_params
    from crab_jax.training import train_step
    from data_pipelines.batching import empty_batch

    config = run_config(gpu, rows)
    model, mesh = config.model.build(), run_mesh.mesh_of(config, jax.devices()[:1])
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> Any:
        key = jax.random.key(int(rng.integers(2**31)))
        noise = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.device_put(noise + 1 if path[-1].key == "scale" else noise, leaf.sharding)

    params = jax.tree_util.tree_map_with_path(draw, run_params.wanted_params(config, model, mesh))
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    tx = optim.optimizer(config.optim, config.steps)
    state = train_step.TrainState(jnp.int32(0), trainable, jax.jit(tx.init)(trainable))
    where_at = train_step.abstract_state(tx, trainable, mesh)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, where_at))
    step_fn, cfg = (
        train_step.compile_step(config, model, mesh, state, tx, run_mesh.micro_batches(config, mesh)),
        model.cfg,
    )
    batches = []
    for bucket, tokens, real in bucket_rows(config):
        if text_only:
            bucket = bucket._replace(frames=0, windows=0, masks=0)
        where = np.arange(bucket.length)
        slots = np.where(where < bucket.frames * cfg.visual.queries + bucket.windows * cfg.audio.queries, where, -1)
        batch = empty_batch(bucket, rows, cfg.clip.image_size).replace(
            tokens=tokens,
            slots=np.broadcast_to(slots, tokens.shape).astype(np.int32),
            text_mask=where < real[:, None],
            loss_mask=(where < real[:, None]) & (where >= real[:, None] - ANSWER),
            seg_kind=np.ones((rows, bucket.masks), np.int32),
            index=np.arange(rows, dtype=np.int32),
        )
        batches.append(jax.device_put(batch, sharding.batch_sharding(mesh)))
    held = [state]

    def step(number: int) -> float:
        held[0], metrics = step_fn(held[0], frozen, batches[number])
        return float(metrics["loss"])

    seconds = timed(step, len(batches), steps)
    stats = jax.devices()[0].memory_stats() or {}
    return {"seconds": seconds, "peak_bytes": stats.get("peak_bytes_in_use", 0)}


def torch_side(gpu: str, rows: int, steps: int, heads: int) -> dict[str, Any]:
    """Measure LlamaForCausalLM with frozen weights; PEFT's LoRA when `heads` is 0, else the released multi-head one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = run_config(gpu, rows)
    cfg, device = config.model, "cuda" if gpu else "cpu"
    sizes = cfg.llama
    dtype = torch.bfloat16 if gpu else torch.float32
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.padded_vocab,
                hidden_size=sizes.hidden,
                intermediate_size=sizes.mlp_dim,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                num_key_value_heads=sizes.kv_heads,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    if heads:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name in TARGETS:
                    if hasattr(part, name):
                        setattr(part, name, multi_head(torch, getattr(part, name), cfg.lora).to(device))
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(
                r=cfg.lora.rank, lora_alpha=cfg.lora.alpha, target_modules=list(TARGETS), lora_dropout=cfg.lora.dropout
            ),
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    batches = []
    for bucket, tokens, real in bucket_rows(config):
        where, ends = np.arange(bucket.length), real[:, None]
        labels = np.where((where < ends) & (where >= ends - ANSWER), tokens, -100)
        batches.append([torch.tensor(x, dtype=torch.long, device=device) for x in (tokens, labels)])
    model.train()

    def step(number: int) -> float:
        tokens, labels = batches[number]
        with torch.autocast(device, dtype, enabled=bool(gpu)):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds = timed(step, len(batches), steps)
    return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0}


def multi_head(torch: Any, base: Any, lora: Any) -> Any:
    """Return the released LoRA layer (peft_hyper/tuners/lora.py) around a linear layer.

    It has one A, a B per head, and a router.
    """

    class MultiHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = torch.nn.Linear
            self.base, self.a = base, linear(base.in_features, lora.rank, bias=False)
            self.b = torch.nn.ModuleList(linear(lora.rank, base.out_features, bias=False) for _ in range(lora.heads))
            self.route = linear(base.in_features, lora.heads, bias=False)
            self.drop = torch.nn.Dropout(lora.dropout)

        def forward(self, x: Any) -> Any:
            y, weights = self.base(x), torch.softmax(self.route(x).float(), -1).to(x.dtype)
            for head, b in enumerate(self.b):
                y = y + weights[..., head, None] * b(self.a(self.drop(x))) * lora.scale
            return y

    return MultiHead()


def side(name: str, gpu: str, rows: int, steps: int) -> dict[str, Any]:
    """Measure one side in this process."""
    if name.startswith("ours"):
        out = ours(gpu, rows, steps, name == "ours-llm")
    else:
        out = torch_side(gpu, rows, steps, 3 if name == "multihead" else 0)
    config = run_config(gpu, rows)
    sizes, made = config.model.llama, bucket_rows(config)
    kv = sizes.kv_heads * sizes.head_dim
    weights = sizes.layers * (2 * sizes.hidden**2 + 2 * sizes.hidden * kv + 3 * sizes.hidden * sizes.mlp_dim)
    weights += sizes.hidden * sizes.padded_vocab
    tokens = sum(int(real.sum()) for _, _, real in made) / out["seconds"]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "side": name,
        "tokens_per_s": tokens,
        "samples_per_s": rows * len(made) / out["seconds"],
        "peak_bytes": out["peak_bytes"] or resident,
        "flops": 4 * weights * tokens,
    }


def table(results: list[dict[str, Any]], peak: float | None) -> str:
    """Format Markdown: each side, and its tokens/s relative to those of PEFT (or of the last side)."""
    base = next((r for r in results if r["side"] == "peft"), results[-1])
    lines = [
        f"| side | real tokens/s | samples/s | peak memory GiB | model FLOP/s | MFU | tokens/s over {base['side']} |",
        "|" + "---|" * 7,
    ]
    for r in results:
        used = f"{r['flops'] / peak:.1%}" if peak else "-"
        lines.append(
            f"| {r['side']} | {r['tokens_per_s']:.0f} | {r['samples_per_s']:.2f} "
            f"| {r['peak_bytes'] / 2**30:.2f} | {r['flops']:.2e} | {used} "
            f"| {r['tokens_per_s'] / base['tokens_per_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=5, help="timed passes over the buckets; the best counts")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)  # measure in this process, print JSON
    args = parser.parse_args()
    gpu = on_gpu()
    if args.one:
        print(json.dumps(side(args.one, gpu, args.rows, args.steps)))
        return
    results = []
    for number, name in enumerate(args.sides.split(","), 1):
        print(f"{number}/{len(args.sides.split(','))}  {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", name, "--rows", str(args.rows), "--steps", str(args.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"error: {name} failed, see above (out of memory? give fewer --rows)")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{gpu or 'CPU'}, {'crab_7b in bfloat16' if gpu else 'small width in float32'}, {args.rows} rows")
    print(table(results, next((flops for word, flops in PEAKS.items() if word in gpu), None) if gpu else None))


if __name__ == "__main__":
    main()
