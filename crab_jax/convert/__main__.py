"""Convert between PyTorch files and checkpoints.

python -m crab_jax.convert import --clip DIR --llama DIR --beats FILE --crab FILE... --out CKPT
python -m crab_jax.convert export CKPT --format crab|hf --out DIR
python -m crab_jax.convert verify CKPT --outputs FILE
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from crab_jax.convert.exporting import FORMATS, export
from crab_jax.convert.importing import Files, describe, import_weights, load_run_config
from crab_jax.convert.released import COMPONENTS, Choices
from crab_jax.convert.verify import verify
from crab_jax.io import paths
from crab_jax.io.bounds import PATH, Real, Whole, Wholes, path
from crab_jax.io.errors import CommandLine, run_verb
from crab_jax.io.locks import locked
from crab_jax.io.structured import read_json
from crab_jax.models.generating import KINDS
from crab_jax.models.quirks import PRESETS


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = CommandLine(__doc__, "python -m crab_jax.convert")
    verb_parser: Any = partial(CommandLine, __doc__)  # argparse calls it like a class
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=verb_parser)

    new = verbs.add_parser("import", help="released files -> checkpoint")
    new.add_argument("--clip", type=path, required=True, help="Hugging Face CLIP directory")
    new.add_argument("--llama", type=path, required=True, help="Hugging Face LLaMA directory")
    new.add_argument("--beats", type=path, required=True, help="BEATs .pt file")
    new.add_argument("--crab", type=path, nargs="+", default=[], help="Crab's files, in loading order")
    new.add_argument("--out", type=path, required=True, help="folder of the checkpoint")
    new.add_argument("--config", type=PATH, help="run config to record (default configs/finetune.py)")
    new.add_argument("--tokenizer", type=path, help="tokenizer (default: of the LLaMA directory)")
    new.add_argument("--position-buffers", type=path, help="file with the random position matrices")
    new.add_argument("--state", default="", help="prefix of the matrices in a file that holds several")
    new.add_argument("--token-rows", type=path, help="file with embed_tokens.new_rows and lm_head.new_rows")
    new.add_argument("--fresh", nargs="*", default=[], choices=COMPONENTS, help="components to draw from --seed")
    new.add_argument("--seed", type=Whole(), default=0, help="seed of all newly drawn weights (default 0)")
    new.add_argument("--bert", type=path, help="config.json of the Q-Formers' BERT (default: bert-base, 12 heads)")
    new.add_argument("--taps", type=Wholes(0, 1024), help="CLIP layers, e.g. 14,22,23")
    new.add_argument("--lora-alpha", type=Real(1e-9, 1e9), default=16.0)
    new.add_argument(
        "--low-res", type=Whole(1, 2**16), help="side at which mask levels are averaged (default: half the image size)"
    )
    new.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of the computation")
    new.add_argument("--compat", default="released", choices=list(PRESETS), help="preset of reference quirks")

    old = verbs.add_parser("export", help="checkpoint -> PyTorch files")
    old.add_argument("checkpoint", type=path)
    old.add_argument("--format", required=True, choices=FORMATS)
    old.add_argument("--out", type=path, required=True)

    check = verbs.add_parser("verify", help="compare with logits stored by PyTorch")
    check.add_argument("checkpoint", type=path)
    check.add_argument("--outputs", type=path, required=True, help=".npz with input_ids and logits")
    check.add_argument("--prefix", default="", help="what precedes 'logits' in its array's name")
    check.add_argument("--max-kl", type=Real(0, 1e9), default=1e-2, help="nats per token (default 0.01)")
    check.add_argument(
        "--weights",
        default="float",
        choices=KINDS,
        help="weights of the language model, rounded to integers or not (default float)",
    )
    for verb in (new, old, check):
        verb.add_argument("--debug", action="store_true", help="show tracebacks")
    return top


def main(arguments: argparse.Namespace) -> None:
    """Run one of the verbs import, export and verify."""
    a = arguments
    if a.verb == "export":
        with locked(a.out):
            print("\n".join(map(str, export(a.checkpoint, a.format, a.out))))
    elif a.verb == "verify":
        agreement = verify(a.checkpoint, a.outputs, a.prefix, a.max_kl, a.weights)
        print("  ".join(f"{name} {value:.4g}" for name, value in agreement.items()))
    else:
        heads = read_json(a.bert, {"num_attention_heads": Whole(1, 1024)})["num_attention_heads"] if a.bert else 12
        files = Files(
            a.clip,
            a.llama,
            a.beats,
            tuple(a.crab),
            a.tokenizer,
            a.position_buffers,
            a.token_rows,
            a.state,
            tuple(a.fresh),
            a.seed,
        )
        choices = Choices(heads, a.taps, a.lora_alpha, a.low_res, a.dtype, a.compat)
        config = load_run_config(paths.at(a.config)) if a.config else None
        with locked(a.out):
            print(describe(import_weights(files, a.out, choices, config)))


if __name__ == "__main__":
    run_verb(lambda: main(parser().parse_args(sys.argv[1:] or ["--help"])), "--debug" in sys.argv)
