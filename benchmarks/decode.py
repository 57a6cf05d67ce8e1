"""Measure prefill time and tokens per second of generation, next to Hugging Face transformers on torch.

    python benchmarks/decode.py --json decode.json              # hidden 512, 4 layers, vocabulary 32017, float32
    python benchmarks/decode.py --model tiny --json decode.json # the tiny language model, hidden 128
    python benchmarks/decode.py --model crab_7b --dtypes bfloat16,int8 --json decode.json    # on a GPU

Both sides decode the same number of tokens greedily from prompts of the same shape, with random weights, on the same
device; torch with one thread and with all, whichever is faster. With LoRA, torch runs every projection as the released
code does (one product for A, one for the router, one for every head); without, plain `LlamaForCausalLM`. Sides take
turns and each keeps its best time. Without torch the baseline columns are empty. `bandwidth_share` is bytes read per
step (weights without the embedding table, and every slot of the KV cache) over step time, relative to the same bytes in
one matrix times a vector, measured in this run. torch has no integer weights here: an int8 row is compared with its
float baseline.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from crab_jax import generate
from crab_jax.io.errors import CommandLine, run_verb
from crab_jax.models.generating import FusedLlama
from crab_jax.models.llama import LlamaConfig, grow_cache, init_cache
from crab_jax.models.lora import LoraConfig
from crab_jax.models.presets import MODELS

SMALL = LlamaConfig(hidden=512, layers=4, heads=8, kv_heads=8, mlp_dim=1376, dtype="float32")
LORA = LoraConfig()


@flax.struct.dataclass
class Prompts:
    """The fields of a batch of text that generation needs."""

    tokens: jax.Array
    text_mask: jax.Array
    index: jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model config as `generate` reads it."""

    llama: LlamaConfig


class Text(nn.Module):
    """The language model alone, with the methods that generation calls."""

    cfg: Sizes
    lora: LoraConfig | None
    kind: str

    def setup(self) -> None:
        self.llama = FusedLlama(self.cfg.llama, self.lora, self.kind)

    @nn.nowrap
    def positions(self, batch: Prompts) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)

    @nn.nowrap
    def empty_cache(self, rows: int, slots: int) -> Any:
        return init_cache(self.cfg.llama, rows, slots)

    @nn.nowrap
    def grown_cache(self, cache: Any, slots: int) -> Any:
        return grow_cache(cache, slots)

    def prefill(self, batch: Prompts, cache: Any) -> Any:
        positions = self.positions(batch)
        return self.llama(self.llama.embed(batch.tokens), positions, cache, positions)

    def decode(self, tokens: jax.Array, positions: jax.Array, slots: jax.Array, cache: Any) -> Any:
        return self.llama(self.llama.embed(tokens), positions, cache, slots)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.llama.logits(hidden)

    def everything(self, batch: Prompts, cache: Any) -> Any:
        return self.logits(self.prefill(batch, cache)[0])


def random_params(model: Text) -> Any:
    """Return random weights in the model's shapes and dtypes."""
    batch = prompts(model.cfg.llama, 1, 2)
    cache = model.empty_cache(1, 2)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, cache, method="everything"))["params"]

    @jax.jit
    def draw() -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return tree.unflatten(
            [
                jax.random.randint(key, leaf.shape, -7, 8).astype(leaf.dtype)
                if jnp.issubdtype(leaf.dtype, jnp.integer)
                else (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
        )

    return draw()


def prompts(cfg: LlamaConfig, rows: int, length: int) -> Prompts:
    """Return random prompts."""
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (rows, length)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones((rows, length), bool), jnp.arange(rows, dtype=jnp.int32))


def seconds(run: Callable[[], Any]) -> float:
    """Return the duration of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ours(model: Text, params: Any, rows: int, length: int, new: int) -> Callable[[], tuple[float, float]]:
    """Return a function that measures (prefill seconds, seconds per decode step)."""
    options = generate.GenerateOptions(-1, 0, tuple(range(6)), new)
    batch = prompts(model.cfg.llama, rows, length)
    start = jax.jit(generate.start, static_argnums=(0, 3)).lower(model, params, batch, options).compile()
    state = jax.eval_shape(lambda: generate.start(model, params, batch, options))
    loop = jax.jit(generate.advance, static_argnums=(0, 3), donate_argnums=2)
    decode = loop.lower(model, params, state, options).compile()

    def measure() -> tuple[float, float]:
        found: list[Any] = []
        prefill = seconds(lambda: found.append(jax.block_until_ready(start(params, batch))))
        return prefill, seconds(lambda: jax.block_until_ready(decode(params, found[0]).tokens)) / (new - 1)

    return measure


def torch_side(
    cfg: LlamaConfig, lora: LoraConfig | None, dtype: str, length: int, new: int
) -> Callable[[int], list[tuple[float, float]]] | None:
    """Return a function of the number of rows that measures transformers, or None without torch.

    With one thread and with all threads it measures (seconds for one token, seconds for all `new`).
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    transformers.logging.set_verbosity_error()

    class Routed(torch.nn.Module):
        def __init__(self, base: Any, lora: LoraConfig):
            super().__init__()
            linear, self.base, self.scale = torch.nn.Linear, base, lora.scale
            self.a = linear(base.in_features, lora.rank, bias=False)
            self.route = linear(base.in_features, lora.heads, bias=False)
            self.b = torch.nn.ModuleList(linear(lora.rank, base.out_features, bias=False) for _ in range(lora.heads))

        def forward(self, x: Any) -> Any:
            y, low = self.base(x), self.a(x)
            weights = self.route(x).float().softmax(-1).to(x.dtype)
            for head, b in enumerate(self.b):
                y = y + weights[..., head : head + 1] * b(low) * self.scale
            return y

    config = transformers.LlamaConfig(
        vocab_size=cfg.padded_vocab,
        hidden_size=cfg.hidden,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.mlp_dim,
    )
    model = transformers.LlamaForCausalLM(config)
    if lora is not None:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(part, name, Routed(child, lora))
    model = model.eval().to(device, getattr(torch, dtype))

    def measure(rows: int) -> list[tuple[float, float]]:
        tokens = torch.randint(3, cfg.vocab_size, (rows, length), device=device)

        def run(count: int) -> None:
            with torch.inference_mode():
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
            if device == "cuda":
                torch.cuda.synchronize()

        found = []
        for threads in (1, os.cpu_count() or 1):
            torch.set_num_threads(threads)
            found.append((seconds(lambda: run(1)), seconds(lambda: run(new))))
        return found

    return measure


def bytes_per_step(cfg: LlamaConfig, params: Any, rows: int, slots: int) -> float:
    """Return the bytes that one decode step reads: weights and the slots of the cache."""
    weights = sum(
        leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
        for name, tree in params["llama"].items()
        if name != "embed_tokens"
        for leaf in jax.tree.leaves(tree)
    )
    return weights + 2 * cfg.layers * rows * slots * cfg.kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize


def memory_ceiling(size: float, dtype: str, repeats: int) -> float:
    """Return the bytes per second of reading `size` bytes as one matrix, times a vector."""
    width = 4096
    matrix = jnp.ones((width, int(size) // (width * jnp.dtype(dtype).itemsize)), dtype)
    vector = jnp.ones((1, width), dtype)
    times = jax.jit(jnp.matmul).lower(vector, matrix).compile()
    jax.block_until_ready(times(vector, matrix))
    return matrix.nbytes / min(seconds(lambda: jax.block_until_ready(times(vector, matrix))) for _ in range(repeats))


def cases(
    cfg: LlamaConfig, dtypes: list[str], batches: list[int], length: int, new: int, repeats: int
) -> list[dict[str, Any]]:
    """Return one row per dtype, LoRA or not, and batch size."""
    found = []
    for lora in (LORA, None):
        for dtype in dtypes:
            kind = "float" if dtype in ("float32", "bfloat16") else dtype
            sizes = cfg if kind != "float" else dataclasses.replace(cfg, dtype=dtype)
            model = Text(Sizes(sizes), lora, kind)
            params = random_params(model)
            theirs = torch_side(sizes, lora, sizes.dtype, length, new)
            for rows in batches:
                size = bytes_per_step(sizes, params, rows, length + new)
                ceiling = memory_ceiling(size, sizes.dtype, 3 * repeats)
                one, best, base = ours(model, params, rows, length, new), [], []
                for _ in range(repeats):
                    best.append(one())
                    base.append(theirs(rows) if theirs else [(np.nan, np.nan)])
                (prefill, step), (first, whole) = np.min(best, axis=0), np.min(base, axis=0).T
                base_prefill, base_step = first.min(), ((whole - first) / (new - 1)).min()
                row = {
                    "case": f"{dtype}, batch {rows}, {'LoRA' if lora else 'no LoRA'}",
                    "tokens_per_s": rows / step,
                    "baseline_tokens_per_s": rows / base_step,
                    "ratio": base_step / step,
                    "bandwidth_share": size / step / ceiling,
                    "prefill_s": prefill,
                    "baseline_prefill_s": base_prefill,
                    "bytes_per_step": size,
                    "memory_bytes_per_s": ceiling,
                }
                row = {
                    key: value if isinstance(value, str) or np.isfinite(value) else None for key, value in row.items()
                }
                found.append(row)
                print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """Format a case as text."""

    def number(value: float | None, digits: int = 1) -> str:
        return f"{'-' if value is None else format(value, f'.{digits}f'):>9}"

    return (
        f"{row['case']:<30}{number(row['tokens_per_s'])}{number(row['baseline_tokens_per_s'])}"
        f"{number(row['ratio'], 2)}{number(row['bandwidth_share'], 2)}{number(row['prefill_s'], 3)}"
        f"{number(row['baseline_prefill_s'], 3)}{number(row['memory_bytes_per_s'] / 1e9)}"
    )


def main() -> None:
    """Entry point."""
    parser = CommandLine(__doc__, "python benchmarks/decode.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--model", choices=("small", *MODELS), default="small")
    parser.add_argument("--dtypes", default="float32,int8", metavar="A,B", help="of float32, bfloat16, int8, int4")
    parser.add_argument("--batches", default="1,8,32", metavar="A,B")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    cfg = SMALL if arguments.model == "small" else MODELS[arguments.model]().llama
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n{'case':<30}"
        + "".join(f"{name:>9}" for name in ("tok/s", "HF tok/s", "ratio", "share", "prefill", "HF", "GB/s"))
    )
    rows = cases(
        cfg,
        arguments.dtypes.split(","),
        [int(n) for n in arguments.batches.split(",")],
        arguments.prompt,
        arguments.new,
        arguments.repeats,
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
