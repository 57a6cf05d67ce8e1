"""The evaluate verb with a scripted model: answers join their examples, masks are saved, files are complete."""

import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from crab_jax import evaluate as verb
from crab_jax import inference, runs
from crab_jax.errors import InputError
from crab_jax.evaluate import check_labels, parse_arguments, select
from crab_jax.models.clip import ClipConfig
from crab_jax.models.llama import KVCache, LlamaConfig
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.tokens import Tokenizer, train_tiny_tokenizer

SIZE = 8
STEPS = 64


@dataclasses.dataclass(frozen=True)
class ScriptConfig:
    """What generation reads of a model config; hidden states are (row's index, step) in two of its numbers."""

    scripts: tuple[tuple[int, ...], ...]
    clip: ClipConfig = ClipConfig(image_size=SIZE, patch_size=4)
    llama: LlamaConfig = LlamaConfig(vocab_size=700, hidden=2, layers=1, heads=1, kv_heads=1, dtype="float32")


class Scripted(nn.Module):
    """Says `scripts[index]` to the example of that index; a mask is its picture's red channel (binary) or value."""

    cfg: ScriptConfig

    @nn.compact
    def prefill(self, batch, cache):
        width = batch.text_mask.shape[1]
        fill = jnp.broadcast_to(batch.index[:, None, None, None].astype(jnp.float32), cache.k.shape[1:])[None]
        start = jnp.broadcast_to(batch.text_mask.sum(-1)[:, None, None, None].astype(jnp.float32), cache.v.shape[1:])
        hidden = jnp.stack([jnp.broadcast_to(batch.index[:, None], (len(batch.index), width)),
                            jnp.zeros((len(batch.index), width), int)], -1)
        return hidden.astype(jnp.float32), KVCache(fill, start[None])

    @nn.compact
    def decode(self, tokens, positions, cache):
        step = positions - cache.v[0, :, 0, 0, :1] + 1
        return jnp.stack([cache.k[0, :, 0, 0, :1], step], -1), cache

    @nn.compact
    def logits(self, hidden):
        table = np.full((len(self.cfg.scripts), STEPS), 2)
        for row, script in enumerate(self.cfg.scripts):
            table[row, :len(script)] = script
        index, step = hidden[..., 0].astype(int), hidden[..., 1].astype(int)
        return nn.one_hot(jnp.asarray(table)[index, jnp.minimum(step, STEPS - 1)], self.cfg.llama.vocab_size)

    @nn.compact
    def masks(self, states, pictures):
        binary = pictures[..., 0].astype(jnp.float32) - 127.5
        return binary, jnp.moveaxis(nn.one_hot(pictures[..., 0] % 71, 71), -1, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tiny_tokenizer(["So the answer is <answer> yes </answer>. The mask is"] * 3, path, 400)
    return Tokenizer.load(path)


def question(name, truth):
    meta = {"answer": truth, "type": ["Audio", "Counting"]}
    return Example(id=name, task="avqa", instruction="Is it loud?", meta=meta)


def picture(name, task, kind):
    return Example(id=name, task=task, instruction="Segment it.", mask=f"{name}.png", mask_kind=kind,
                   meta={"objects": ["dog"], "video": name})


EXAMPLES = [question("q/1", "yes"), question("q/2", "no"), picture("s 1", "s4", "binary"),
            picture("s 2", "s4", "binary"), picture("c", "avss", "semantic")]
TEXTS = [TASKS["avqa"].target("yes"), "no idea", f"It is {MASK}", "nothing to see", f"It is {MASK}"]


HALF = np.zeros((SIZE, SIZE), np.int32)
HALF[:, :4] = 1


def text_batch(indices):
    lengths = np.array([3, 5, 2, 4])[:len(indices)]
    batch = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=0), len(indices), SIZE)
    return batch.replace(index=np.array(indices, np.int32), text_mask=np.arange(5) < lengths[:, None])


def mask_batch(indices, kinds, values):
    """The left half of every picture is to be segmented: it has the label's value, or white for a binary mask."""
    values = np.array(values)[:, None, None, None]
    empty = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=1), len(indices), SIZE)
    return empty.replace(
        index=np.array(indices, np.int32), text_mask=text_batch(indices).text_mask,
        seg_kind=np.array(kinds, np.int32)[:, None], seg_target=(HALF * values).astype(np.int32),
        seg_frame=(HALF * np.where(values == 1, 255, values))[..., None].repeat(3, -1).astype(np.uint8))


def batches():
    """Two batches in another order than the examples, with a filler row each."""
    return [mask_batch([4, 2, 3, -1], [2, 1, 1, 0], [5, 1, 1, 0]), text_batch([1, 0, -1])]


@pytest.fixture(scope="module")
def model(tokenizer):
    return Scripted(ScriptConfig(tuple(tuple(tokenizer.ids(text)) + (tokenizer.eos_id,) for text in TEXTS)))


def run(root, monkeypatch, model, tokenizer, *flags):
    """Evaluate the scripted model on a small data root; returns what the data side was asked for."""
    asked = {}
    write_jsonl(root / "test.jsonl", EXAMPLES)
    for example in EXAMPLES[2:]:
        Image.fromarray((HALF * (5 if example.id == "c" else 255)).astype(np.uint8)).save(root / example.mask)
    config = ConfigDict({"data": {"root": str(root)}})
    monkeypatch.setattr(runs, "load_model", lambda path: (model, {}, config, tokenizer))

    def eval_batches(examples, root, config, tokenizer, batch_size, **changes):
        asked.update(changes)
        return ((None, batch) for batch in batches())

    monkeypatch.setattr(inference, "eval_batches", eval_batches)
    verb.evaluate(parse_arguments(["--checkpoint", "x", "--out", str(root / "out"), "--max-new-tokens", str(STEPS),
                                   *flags]))
    return asked


def test_files_are_complete(tmp_path, monkeypatch, model, tokenizer, capsys):
    asked = run(tmp_path, monkeypatch, model, tokenizer, "--mute-audio")
    assert (asked["mute_audio"], asked["blank_video"], asked["on_error"]) == (True, False, "raise")
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())["tasks"]
    assert set(results) == {"avqa", "s4", "avss"}
    assert (results["avqa"]["accuracy"], results["avqa"]["n"], results["avqa"]["n_unparsed"]) == (0.5, 2, 1)
    assert (results["s4"]["n"], results["s4"]["n_no_mask"], results["s4"]["miou"]) == (2, 1, 0.5)
    assert results["avss"]["miou_present"] == 1.0
    assert set(results["avss"]["intervals"]) == set(results["avss"]) - {"n", "n_unparsed", "n_no_mask", "intervals"}

    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {e.id for e in EXAMPLES}
    by_id = {line["id"]: line for line in lines}
    assert set(by_id["q/1"]) == {"id", "task", "prompt", "text", "parsed", "mask", "label"}
    assert by_id["q/1"]["parsed"] == "yes" and by_id["q/1"]["label"]["answer"] == "yes"
    assert by_id["q/2"]["parsed"] is None and by_id["s 2"]["mask"] is None
    white = np.asarray(Image.open(out / by_id["s 1"]["mask"]))
    assert set(np.unique(white)) == {0, 255}
    assert np.asarray(Image.open(out / by_id["c"]["mask"])).max() == 5

    shown = capsys.readouterr().out
    assert "5/5" in shown and "eta" in shown and (out / "results.md").read_text().strip() in shown


def test_select_takes_the_first_of_each_task():
    assert [e.id for e in select(EXAMPLES, limit=1)] == ["q/1", "s 1", "c"]
    assert [e.id for e in select(EXAMPLES, ["s4"])] == ["s 1", "s 2"]
    with pytest.raises(InputError, match="unknown task 's5'"):
        select(EXAMPLES, ["s5"])
    with pytest.raises(InputError, match="no example of ave"):
        select(EXAMPLES, ["ave"])


def test_labels_are_checked_before_decoding():
    check_labels(EXAMPLES)
    for broken in (dataclasses.replace(EXAMPLES[0], meta={}), dataclasses.replace(EXAMPLES[2], mask=None),
                   dataclasses.replace(EXAMPLES[4], mask_kind="binary")):
        with pytest.raises(InputError, match=broken.id):
            check_labels([broken])


def test_help_shows_an_example_and_bad_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    assert "python -m crab_jax.evaluate --checkpoint runs/x --tasks ave,s4" in capsys.readouterr().out
    with pytest.raises(InputError, match="--limit.*'0' is not a positive number"):
        parse_arguments(["--checkpoint", "x", "--out", "y", "--limit", "0"])
