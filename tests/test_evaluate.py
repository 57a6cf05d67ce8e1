"""The evaluate verb with a scripted model: answers join their examples, masks are saved, files are complete."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from crab_jax import api, defaults, inference
from crab_jax import evaluate as verb
from crab_jax.config import resolve
from crab_jax.evaluate import parse_arguments, select
from crab_jax.evaluation import judging, scoring
from crab_jax.evaluation.judging import check_labels
from crab_jax.io.errors import InputError
from crab_jax.models import presets
from crab_jax.models.clip import ClipConfig
from crab_jax.models.llama import KVCache, LlamaConfig, grow_cache, init_cache
from crab_jax.parallel import sharding
from crab_jax.reports import answer_pictures
from crab_jax.runs import run_folder, run_mesh, run_params
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from crab_jax.visualize import charts
from data_pipelines.av_uie import labels
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.media import inline_mask
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
    def features(self, frames, fbank):
        return jnp.zeros((len(frames), 1, 2))

    @nn.compact
    def prefill(self, batch, cache, features):
        width = batch.text_mask.shape[1]
        fill = jnp.broadcast_to(batch.index[:, None, None, None].astype(jnp.float32), cache.k.shape[1:])[None]
        start = jnp.broadcast_to(batch.text_mask.sum(-1)[:, None, None, None].astype(jnp.float32), cache.v.shape[1:])
        hidden = jnp.stack(
            [
                jnp.broadcast_to(batch.index[:, None], (len(batch.index), width)),
                jnp.zeros((len(batch.index), width), int),
            ],
            -1,
        )
        return hidden.astype(jnp.float32), KVCache(fill, start[None])

    @nn.nowrap
    def positions(self, batch):
        return jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)

    @nn.nowrap
    def empty_cache(self, rows, slots):
        return init_cache(self.cfg.llama, rows, slots)

    @nn.nowrap
    def grown_cache(self, cache, slots):
        return grow_cache(cache, slots)

    @nn.compact
    def decode(self, tokens, positions, slots, cache):
        step = positions - cache.v[0, :, 0, 0, :1] + 1
        return jnp.stack([cache.k[0, :, 0, 0, :1], step], -1), cache

    @nn.compact
    def logits(self, hidden):
        table = np.full((len(self.cfg.scripts), STEPS), 2)
        for row, script in enumerate(self.cfg.scripts):
            table[row, : len(script)] = script
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
    return Example(
        id=name,
        task=task,
        instruction="Segment it.",
        mask=f"{name}.png",
        mask_kind=kind,
        meta={"objects": ["dog"], "video": name},
    )


EXAMPLES = [
    question("q/1", "yes"),
    question("q/2", "no"),
    picture("s 1", "s4", "binary"),
    picture("s 2", "s4", "binary"),
    picture("c", "avss", "semantic"),
]
TEXTS = [TASKS["avqa"].target("yes"), "no idea", f"It is {MASK}", "nothing to see", f"It is {MASK}"]


HALF = np.zeros((SIZE, SIZE), np.int32)
HALF[:, :4] = 1


def text_batch(indices):
    lengths = np.array([3, 5, 2, 4])[: len(indices)]
    batch = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=0), len(indices), SIZE)
    return batch.replace(index=np.array(indices, np.int32), text_mask=np.arange(5) < lengths[:, None])


def mask_batch(indices, kinds, values):
    """The left half of every picture is to be segmented: it has the label's value, or white for a binary mask."""
    values = np.array(values)[:, None, None, None]
    empty = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=1), len(indices), SIZE)
    return empty.replace(
        index=np.array(indices, np.int32),
        text_mask=text_batch(indices).text_mask,
        seg_kind=np.array(kinds, np.int32)[:, None],
        seg_target=(HALF * values).astype(np.int32),
        seg_frame=(HALF * np.where(values == 1, 255, values))[..., None].repeat(3, -1).astype(np.uint8),
    )


def batches():
    """Two batches in another order than the examples, with a filler row each."""
    return [mask_batch([4, 2, 3, -1], [2, 1, 1, 0], [5, 1, 1, 0]), text_batch([1, 0, -1])]


@pytest.fixture(scope="module")
def model(tokenizer):
    return Scripted(ScriptConfig(tuple(tuple(tokenizer.ids(text)) + (tokenizer.eos_id,) for text in TEXTS)))


def run_config(root, **changes):
    config = defaults.tiny()
    config.update_from_flattened_dict({"data.root": str(root), **changes})
    return resolve(config)


def run(root, monkeypatch, model, tokenizer, *flags):
    """Evaluate the scripted model on a small data root; returns what the data side was asked for."""
    asked = {}
    write_jsonl(root / "test.jsonl", EXAMPLES)
    for example in EXAMPLES[2:]:
        Image.fromarray((HALF * (5 if example.id == "c" else 255)).astype(np.uint8)).save(root / example.mask)
    config = run_config(root)
    monkeypatch.setattr(run_folder, "load_config", lambda path: config)
    monkeypatch.setattr(run_mesh, "serving_mesh", lambda *asked: sharding.make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(run_params, "load_model", lambda path, weights, mesh: (model, {}, config, tokenizer))

    def eval_batches(examples, root, config, tokenizer, batch_size, **changes):
        asked.update(changes)
        return ((None, batch) for batch in batches())

    monkeypatch.setattr(inference, "eval_batches", eval_batches)
    verb.evaluate(
        parse_arguments(
            ["--checkpoint", "x", "--out", str(root / "out"), "--max-new-tokens", str(STEPS), "--examples", "0", *flags]
        )
    )
    return asked


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Few resamples and no bar charts: most of the time of a small evaluation, and tested elsewhere."""
    monkeypatch.setattr(scoring.summarise, "__defaults__", (20, 0))
    if "page" not in request.node.name:
        monkeypatch.setattr(charts, "breakdown_bars", lambda *arguments: b"")


class Killed(BaseException):
    """Ends a program where it stands, as kill -9 would."""


PICTURES = {"s 1": HALF * 0.9, "s 2": None, "c": HALF * 5}


def answered(todo, rng=None, deaths=()):
    """Predictions in a random order; the program dies before the k-th for every k of `deaths`."""
    todo = list(todo)
    for number, index in enumerate(range(len(todo)) if rng is None else rng.permutation(len(todo))):
        if number in deaths:
            raise Killed
        example = todo[index]
        text = TEXTS[[one.id for one in EXAMPLES].index(example.id)]
        yield inference.read_answer(example, text, PICTURES.get(example.id))


@pytest.fixture
def answering(tmp_path, monkeypatch, tokenizer):
    """(out folder, function that evaluates); the model answers as `answered` says, from params and flags."""
    write_jsonl(tmp_path / "test.jsonl", EXAMPLES)
    for example in EXAMPLES[2:]:
        Image.fromarray((HALF * (5 if example.id == "c" else 255)).astype(np.uint8)).save(tmp_path / example.mask)
    asked, decoding = [], []

    def evaluate(*flags, out="out", params=1.0, rng=None, deaths=(), changes=(), tokenizer=tokenizer):
        def predict_examples(model, params, config, tokenizer, todo, *rest, **changes):
            asked.append([example.id for example in todo])
            decoding.append(changes["decoding"])
            return answered(todo, rng, deaths)

        config = run_config(tmp_path, **dict(changes))
        monkeypatch.setattr(run_folder, "load_config", lambda path: config)
        monkeypatch.setattr(run_mesh, "serving_mesh", lambda *asked: sharding.make_mesh(devices=jax.devices()[:1]))
        monkeypatch.setattr(
            run_params, "load_model", lambda *asked: (None, {"w": np.full(3, params)}, config, tokenizer)
        )
        monkeypatch.setattr(api, "predict_examples", predict_examples)
        arguments = ["--out", str(tmp_path / out), "--examples", "0", *flags]
        if "--predictions" not in flags:
            arguments += ["--checkpoint", "x"]
        verb.evaluate(parse_arguments(arguments))

    evaluate.asked, evaluate.decoding = asked, decoding
    return tmp_path, evaluate


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_killed_five_times_the_result_is_the_same(answering):
    root, evaluate = answering
    evaluate(out="whole")
    rng = np.random.default_rng(5)
    for _ in range(5):
        with pytest.raises(Killed):
            evaluate(rng=rng, deaths=(1,) if rng.random() < 0.6 else (0,))
        predictions = root / "out" / "predictions.jsonl"
        if predictions.exists() and rng.random() < 0.7:  # the last line was being written
            predictions.write_bytes(predictions.read_bytes()[: -int(rng.integers(1, 40))])
    evaluate(rng=rng)
    assert files(root / "out") == files(root / "whole")
    done = len(evaluate.asked)
    evaluate()
    assert len(evaluate.asked) == done  # nothing was left to answer


def test_processes_share_the_work_and_process_0_merges(answering):
    root, evaluate = answering
    evaluate(out="whole")
    with pytest.raises(Killed):
        evaluate("--process", "0/2", deaths=(0,))  # claims the folder
    evaluate("--process", "1/2")
    assert not (root / "out" / "results.json").exists()
    evaluate("--process", "0/2")
    assert evaluate.asked[-2:] == [[e.id for e in EXAMPLES[1::2]], [e.id for e in EXAMPLES[0::2]]]
    assert files(root / "out") == files(root / "whole")


def test_process_0_says_who_is_missing(answering, monkeypatch):
    _, evaluate = answering
    monkeypatch.setattr(verb, "PATIENCE", -1)
    with pytest.raises(InputError, match="--process.*answers of the other processes"):
        evaluate("--process", "0/2")
    for wrong in ("2/2", "a/2", "1", "-1/2"):
        with pytest.raises(InputError, match="is not I/N"):
            parse_arguments(["--checkpoint", "x", "--out", "o", f"--process={wrong}"])


def test_answers_of_another_model_are_set_aside_not_mixed(answering, capsys):
    root, evaluate = answering
    evaluate("--tasks", "avqa")
    evaluate("--limit", "1")  # more of the same evaluation
    assert evaluate.asked == [["q/1", "q/2"], ["s 1", "c"]]
    assert len((root / "out" / "predictions.jsonl").read_text().splitlines()) == 4
    evaluate("--tasks", "avqa", params=2.0)
    assert evaluate.asked[-1] == ["q/1", "q/2"] and "moved to" in capsys.readouterr().out
    assert len((root / "out" / "previous" / "predictions.jsonl").read_text().splitlines()) == 4
    evaluate("--tasks", "avqa", "--mute-audio", params=2.0)
    assert evaluate.asked[-1] == ["q/1", "q/2"]
    evaluate("--tasks", "avqa", "--mute-audio", "--force-masks", params=2.0)
    assert evaluate.asked[-1] == ["q/1", "q/2"]
    assert [one["force_masks"] for one in evaluate.decoding[-2:]] == [False, True]


# What answers depend on, and a change of each.
ANOTHER = {
    "parameters": {"params": 2.0},
    "max_new_tokens": ("--max-new-tokens", "9"),
    "force_masks": ("--force-masks",),
    "weights": ("--weights", "int8"),
    "mute_audio": ("--mute-audio",),
    "blank_video": ("--blank-video",),
    "video_frames": {"data.video_frames": 3},
    "pad_short_audio": {"data.pad_short_audio": True},
    "image_size": {"sizes.clip.image_size": 32, "sizes.seg.image_size": 32, "sizes.seg.grid": 4},
    "visual_queries": {"sizes.visual.queries": 5},
    "audio_queries": {"sizes.audio.queries": 5},
    "clock": {"compat": "released"},
    "model": {"sizes.llama.heads": 2, "sizes.llama.kv_heads": 2},
    "tokenizer": {},
    "examples": {},
}
SAME = [
    ("--batch-size", "3"),
    ("--examples", "0"),
    ("--tensor", "1"),
    ("--cache-dir", "c"),
    {"data.lengths": (64, 2048)},
    {"data.on_error": "skip"},
    {"seed": 5},
    {"steps": 9},
]


@pytest.mark.parametrize("name", ANOTHER)
def test_a_change_of_whatever_answers_depend_on_starts_anew(answering, capsys, name):
    root, evaluate = answering
    evaluate("--tasks", "avqa")
    assert set(json.loads((root / "out/evaluation.json").read_text())["identity"]) == set(ANOTHER)
    change, flags, keys = ANOTHER[name], (), {}
    if name == "examples":
        write_jsonl(root / "test.jsonl", [dataclasses.replace(EXAMPLES[0], instruction="Is it low?"), *EXAMPLES[1:]])
    elif name == "tokenizer":
        train_tiny_tokenizer(["It is <answer> no </answer>"] * 3, root / "tokenizer.json", 400)
        keys = {"tokenizer": Tokenizer.load(root / "tokenizer.json")}
    elif isinstance(change, tuple):
        flags = change
    else:
        keys = change if name == "parameters" else {"changes": change}
    evaluate("--tasks", "avqa", *flags, **keys)
    assert evaluate.asked == [["q/1", "q/2"], ["q/1", "q/2"]]
    said = capsys.readouterr().out
    assert "what differs: " in said and name in said.partition("what differs: ")[2].splitlines()[0].split(", ")


def test_what_answers_do_not_depend_on_changes_nothing(answering):
    root, evaluate = answering
    evaluate()
    for change in SAME:
        evaluate(*(change if isinstance(change, tuple) else ()), changes=change if isinstance(change, dict) else ())
    assert len(evaluate.asked) == 1 and not (root / "out/previous").exists()


def test_a_folder_of_an_older_version_goes_on_and_that_is_said(answering, capsys):
    root, evaluate = answering
    evaluate("--tasks", "avqa")
    file = root / "out/evaluation.json"
    description = json.loads(file.read_text())
    old = ("parameters", "max_new_tokens", "mute_audio", "blank_video", "force_masks", "examples")
    description["identity"] = {name: description["identity"][name] for name in old}
    file.write_text(json.dumps(description))
    evaluate("--tasks", "avqa")
    assert len(evaluate.asked) == 1 and "did not note weights, tokenizer, " in capsys.readouterr().out
    assert set(json.loads(file.read_text())["identity"]) == set(ANOTHER)
    description["identity"]["max_new_tokens"] = 9
    file.write_text(json.dumps(description))
    evaluate("--tasks", "avqa")
    assert len(evaluate.asked) == 2


def test_other_masks_beside_the_same_predictions_are_scored_anew(answering):
    root, evaluate = answering
    evaluate()
    file, masks = root / "out/predictions.jsonl", sorted((root / "out/masks").glob("s_1*"))
    arguments = ("--predictions", str(file), "--data", str(root), "--tasks", "s4")
    evaluate(*arguments, out="again")
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(masks[0])
    evaluate(*arguments, out="again")
    assert (root / "again/previous").is_dir()
    wrong = json.loads((root / "again/results.json").read_text())["tasks"]["s4"]["miou"]
    assert wrong < json.loads((root / "out/results.json").read_text())["tasks"]["s4"]["miou"]


@pytest.mark.parametrize("shape", ["run lengths", "png"])
def test_a_mask_of_another_shape_than_the_truth_is_refused(tmp_path, answering, capsys, shape):
    """Its height and width exchanged: a square made of it would be another picture."""
    root, evaluate = answering
    truth = np.zeros((12, 20), np.uint8)
    truth[2:9, 3:7] = 255
    Image.fromarray(truth).save(root / "s 1.png")
    right, turned = np.asfortranarray(truth > 0).astype(np.uint8, order="F"), np.asfortranarray(truth.T > 0)
    if shape == "png":
        masks = []
        for name, mask in (("right", truth), ("turned", truth.T), ("square", truth[:, :12]), ("half", truth[::2, ::2])):
            Image.fromarray(mask).save(root / f"{name}.png")
            masks.append(f"{name}.png")
    else:
        code = coco.encode(right)["counts"].decode()
        masks = [{"size": [12, 20], "counts": code}, {"size": [20, 12], "counts": code}]
        masks.append({"size": [20, 12], "counts": coco.encode(turned.astype(np.uint8, order="F"))["counts"].decode()})
    for number, mask in enumerate(masks):
        (root / "p.jsonl").write_text(json.dumps({"id": "s 1", "text": "", "mask": mask}) + "\n")
        arguments = ("--predictions", str(root / "p.jsonl"), "--data", str(root), "--tasks", "s4", "--limit", "1")
        if number == 1 or number == 2 and shape != "png":
            with pytest.raises(
                InputError, match="is 12x20, but the true mask is 20x12: width and height are exchanged"
            ) as refused:
                evaluate(*arguments, out=f"o{number}")
            assert "p.jsonl, s 1" in str(refused.value)
        else:
            evaluate(*arguments, out=f"o{number}")
    assert json.loads((root / "o0/results.json").read_text())["tasks"]["s4"]["miou"] > 0.95


@pytest.mark.parametrize("mask", ["m.png", "run lengths"])
def test_a_true_mask_is_compared_with_its_picture_wherever_they_meet(tmp_path, mask):
    """Its height and width exchanged: scoring, drawing and the reasoning about its place refuse it."""
    truth = np.zeros((12, 20), np.uint8)
    truth[2:9, 3:7] = 255
    Image.fromarray(truth).save(tmp_path / "m.png")
    if mask != "m.png":
        mask = inline_mask(coco.encode(np.asfortranarray((truth > 0).astype(np.uint8))))
    answer = inference.read_answer(picture("x", "s4", "binary"), f"It is {MASK}", HALF * 0.5)
    for size, fits in (((20, 12), True), ((12, 20), False)):
        Image.new("RGB", size).save(tmp_path / "p.png")
        example = dataclasses.replace(answer.example, mask=mask, image="p.png", second=0)
        write_jsonl(tmp_path / "test.jsonl", [example])
        (tmp_path / "predictions.jsonl").write_text(json.dumps({"id": "x", "task": "s4", "text": "", "mask": None}))
        for use, arguments in (
            (judging.judge_folder, (tmp_path, [example], tmp_path)),
            (answer_pictures.mask_picture, (example, answer, tmp_path, "shown")),
            (labels.places, (example, tmp_path)),
        ):
            if fits:
                use(*arguments)
            else:
                with pytest.raises(InputError, match="is 20x12, but its picture is 12x20"):
                    use(*arguments)
    (tmp_path / "p.png").unlink()
    judging.judge_folder(tmp_path, [example], tmp_path)  # what is scored needs masks alone


def test_predictions_are_scored_without_a_model_as_with_one(answering):
    root, evaluate = answering
    evaluate()
    before = len(evaluate.asked)
    evaluate("--predictions", str(root / "out" / "predictions.jsonl"), "--data", str(root), out="again")
    evaluate("--predictions", str(root / "out" / "predictions.jsonl"), "--tasks", "s4", "--data", str(root), out="s4")
    assert len(evaluate.asked) == before
    found, again = files(root / "out"), files(root / "again")
    assert {name: found[name] for name in found if name not in ("evaluation.json", "results.html")} == {
        name: again[name] for name in again if name not in ("evaluation.json", "results.html")
    }
    assert list(json.loads((root / "s4" / "results.json").read_text())["tasks"]) == ["s4"]
    with pytest.raises(InputError, match="--data"):
        evaluate("--predictions", str(root / "out" / "predictions.jsonl"))
    with pytest.raises(InputError, match="exactly one of --checkpoint and --predictions"):
        parse_arguments(["--out", "o"])


def test_the_page_shows_published_numbers_every_metric_and_examples(answering):
    root, evaluate = answering
    evaluate("--examples", "1")
    page = (root / "out" / "results.html").read_text()
    assert "0.7894" in page and "TSPM" in page  # MUSIC-AVQA, beside ours
    assert all(f"<td>{name}</td>" in page or f"<b>{name}</b>" in page for name in TASKS["s4"].metrics)
    assert "q/2" in page and "not drawn" in page  # these examples have no media
    results = json.loads((root / "out" / "results.json").read_text())
    assert results["breakdown"]["avqa"] == {"Audio/Counting": {"value": 0.5, "n": 2}}
    assert results["breakdown"]["avss"] == {name: {"value": 1.0, "n": 1} for name in ("background", "bassoon")}


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
    assert [line["id"] for line in lines] == [e.id for e in EXAMPLES]
    by_id = {line["id"]: line for line in lines}
    assert set(by_id["q/1"]) == {"id", "task", "prompt", "text", "parsed", "mask", "label"}
    assert by_id["q/1"]["parsed"] == "yes" and by_id["q/1"]["label"]["answer"] == "yes"
    assert by_id["q/2"]["parsed"] is None and by_id["s 2"]["mask"] is None
    white = np.asarray(Image.open(out / by_id["s 1"]["mask"]))
    assert set(np.unique(white)) == {0, 255}
    assert np.asarray(Image.open(out / by_id["c"]["mask"])).max() == 5

    shown, told = capsys.readouterr()
    assert "examples 5/5" in told and (out / "results.md").read_text().split("\n\n")[0] in shown


def test_select_takes_the_first_of_each_task():
    assert [e.id for e in select(EXAMPLES, limit=1)] == ["q/1", "s 1", "c"]
    assert [e.id for e in select(EXAMPLES, ["s4"])] == ["s 1", "s 2"]
    with pytest.raises(InputError, match="unknown task 's5'"):
        select(EXAMPLES, ["s5"])
    with pytest.raises(InputError, match="no example of ave"):
        select(EXAMPLES, ["ave"])


def test_labels_are_checked_before_decoding():
    check_labels(EXAMPLES)
    for broken in (
        dataclasses.replace(EXAMPLES[0], meta={}),
        dataclasses.replace(EXAMPLES[2], mask=None),
        dataclasses.replace(EXAMPLES[4], mask_kind="binary"),
    ):
        with pytest.raises(InputError, match=broken.id):
            check_labels([broken])


def test_help_shows_an_example_and_bad_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    assert "python -m crab_jax.evaluate --checkpoint runs/x --tasks ave,s4" in capsys.readouterr().out
    with pytest.raises(InputError, match="--limit.*'0' must be a whole number from 1"):
        parse_arguments(["--checkpoint", "x", "--out", "y", "--limit", "0"])


def test_answers_do_not_depend_on_how_a_model_was_trained_or_which_kernel_attends():
    """Evaluations of before these fields go on, whatever a later version calls the same model."""
    cfg = presets.tiny()
    facts = verb._answering(dataclasses.asdict(cfg))
    other = dataclasses.replace(
        cfg,
        llama=dataclasses.replace(cfg.llama, remat="full", attention="einsum"),
        lora=dataclasses.replace(cfg.lora, dropout=0.3, dropout_bits="threefry"),
    )
    assert verb._answering(dataclasses.asdict(other)) == facts
    heads = dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, heads=4))
    assert verb._answering(dataclasses.asdict(heads)) != facts and facts["clip"] == dataclasses.asdict(cfg.clip)
