"""The verbs that look at data and convert models, with every path in a bucket."""

import contextlib
import io
import json
import zipfile

import pytest

from crab_jax.convert import __main__ as convert
from crab_jax.io.errors import InputError
from crab_jax.reports import input_plan, record_page
from data_pipelines import datasets, index, prepare, shards, status, tokens, validate
from data_pipelines.av_uie import __main__ as av_uie
from data_pipelines.av_uie import annotate, released
from data_pipelines.examples import read_jsonl
from data_pipelines.own import verb as own_verb
from data_pipelines.sources import scenes


def said_by(run, *words: object) -> str:
    """Return what a verb prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run([str(word) for word in words])
    return out.getvalue()


@pytest.fixture(scope="module")
def raw(bucket, tmp_path_factory):
    """A data root of a few scenes that the verb itself has written into the bucket."""
    root = bucket.at("raw")
    scenes._write_from(["--out", str(root), "--train", "2", "--val", "1", "--test", "1", "--workers", "0"])
    return root


def test_scenes_in_a_bucket_are_those_on_a_disk(raw, tmp_path):
    scenes.write(tmp_path, {"train": 2, "val": 1, "test": 1})
    there = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*"))
    assert there == sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    for name in ("train.jsonl", "train/000000/clip.mp4", "train/000001/scene.json", "scenes.json"):
        assert (raw / name).read_bytes() == (tmp_path / name).read_bytes()
    assert scenes.occupancy(raw, scenes.load_split(raw, "test")[0]).shape[0] == 10


def test_status_validate_and_sample_read_a_bucket(bucket, raw, scenes_root):
    report = bucket.at("reports/status.json")
    assert "train" in said_by(status.run, "--root", raw, "--json", report)
    counted = {count["split"]: count["have"] for count in json.loads(report.read_bytes())["counts"]}
    assert counted["train"] == len(read_jsonl(raw / "train.jsonl"))
    assert not validate.run(["--root", str(raw), "--json", str(report), "--workers", "1"])
    assert not [p for p in json.loads(report.read_bytes())["problems"] if not p["problem"].startswith("warning")]
    out = bucket.at("sample")
    assert "records in" in said_by(record_page.run, "--root", raw, "--n", 1, "--out", out)
    assert b"data:image" in (out / "index.html").read_bytes()


def test_a_film_that_is_cut_off_is_found_in_a_bucket(bucket, raw):
    broken = bucket.at("broken")
    film = (raw / "train/000000/clip.mp4").read_bytes()
    (broken / "clip.mp4").write_bytes(film[: len(film) // 2])
    line = json.loads((raw / "train.jsonl").read_text().splitlines()[0])
    (broken / "train.jsonl").write_text(
        json.dumps(
            {
                "id": "a",
                "task": line["task"],
                "instruction": line["instruction"],
                "target": line["target"],
                "video": "clip.mp4",
            }
        )
        + "\n"
    )
    assert "corrupt" in said_by(status.run, "--root", broken)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert validate.run(["--root", str(broken), "--workers", "1"])
    assert "corrupt" in out.getvalue()


def test_a_table_becomes_lists_in_a_bucket(bucket, raw):
    table, root = bucket.at("tables/clips.csv"), bucket.at("mine")
    (bucket.at("tables") / "band.mp4").write_bytes((raw / "train/000000/clip.mp4").read_bytes())
    table.write_text(
        "task,media,question,answer\navqa,band.mp4,How many instruments are sounding?,two\n"
        f"avqa,{raw / 'train/000001/clip.mp4'},How many instruments are sounding?,one\n"
    )
    with pytest.raises(InputError, match="outside of --root"):
        own_verb.run(["--csv", str(table), "--root", str(root), "--workers", "1"])
    assert "2 examples" in said_by(own_verb.run, "--csv", table, "--root", root, "--copy", "--workers", "1")
    films = [example.video for example in read_jsonl(root / "train.jsonl")]
    assert films[0] == "media/band.mp4" and all((root / film).is_file() for film in films)


def test_targets_are_written_checked_and_described_in_a_bucket(bucket, raw):
    written, checked = bucket.at("av_uie/written.jsonl"), bucket.at("av_uie/checked")
    av_uie._run(["write", "--examples", str(raw / "train.jsonl"), "--root", str(raw), "--out", str(written)])
    av_uie._run(["verify", "--examples", str(written), "--root", str(raw), "--out", str(checked)])
    assert len(read_jsonl(checked / "good.jsonl")) == len(read_jsonl(written)) > 10
    av_uie._run(["card", "--examples", str(checked / "good.jsonl"), "--out", str(bucket.at("av_uie/card"))])
    assert (bucket.at("av_uie/card") / "card.md").read_text().startswith("# AV-UIE")


def test_released_labels_are_read_from_a_bucket(bucket, tmp_path):
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        archive.writestr("converted_label/a.txt", "I see a dog.")
    packed, folder = bucket.at("labels/ave_converted_label.zip"), bucket.at("unpacked/converted_label")
    packed.write_bytes((tmp_path / "labels.zip").read_bytes())
    (folder / "a.txt").write_text("I see a dog.")
    assert released.read(packed).texts == released.read(folder, "ave").texts == {"a": "I see a dog."}


def test_a_journal_in_a_bucket_is_continued(bucket):
    file = bucket.at("llm.jsonl.journal")
    reply = {"request": "r", "model": "m", "text": "schön", "tokens_in": 1, "tokens_out": 2, "estimated": False}
    journal = annotate.Journal(file)
    journal.add({"id": "a", **reply})
    with pytest.raises(InputError, match="is in use"):
        annotate.Journal(file)
    journal.close()
    file.write_bytes(file.read_bytes() + b'{"id": "ha')
    again = annotate.Journal(file)
    again.add({"id": "b", **reply})
    again.close()
    assert [json.loads(line)["id"] for line in bucket.content("llm.jsonl.journal").splitlines()] == ["a", "b"]


def test_a_tokenizer_is_trained_on_examples_in_a_bucket(bucket, raw):
    out = bucket.at("tokenizer.json")
    tokens._train_from(["--corpus", str(raw / "train.jsonl"), "--out", str(out), "--vocab-size", "400"])
    assert tokens.Tokenizer.load(str(out)).ids("a dog barks")


def test_a_plan_of_data_in_a_bucket(bucket, raw):
    report = bucket.at("reports/plan.json")
    words = ("--config=configs/tiny.py", "--root", raw, "--step-seconds", "1", "--samples", "1", "--json", report)
    assert "samples/s" in said_by(input_plan.run, *words)
    assert json.loads(report.read_bytes())["prepared"]["core_samples_per_s"] > 0


def test_a_model_is_imported_verified_and_exported_in_a_bucket(bucket, golden, tmp_path):
    """And exported once more to a disk: the files are the same, byte for byte."""
    weights, choices = bucket.upload(golden / "weights", "weights"), json.loads((golden / "manifest.json").read_text())
    bucket.at("llama.npz").write_bytes((golden / "llama.npz").read_bytes())
    bucket.at("bert.json").write_text(json.dumps(choices["config"]["bert"]))
    model, back = bucket.at("model"), bucket.at("back")

    def run(*words: object) -> None:
        convert.main(convert.parser().parse_args([str(word) for word in words]))

    beats = next(path for path in (weights / "beats").iterdir() if path.suffix == ".pt")
    released = ("--clip", weights / "clip", "--llama", weights / "llama", "--beats", beats)
    sizes = ("--taps", ",".join(map(str, choices["config"]["select_layer_list"])), "--bert", bucket.at("bert.json"))
    sizes += ("--low-res", choices["config"]["seg"]["low_res_mask_size"], "--dtype", "float32")
    sizes += ("--lora-alpha", choices["config"]["lora"]["lora_alpha"], "--fresh", "seg_module")
    crab = ("--crab", weights / "crab/finetune_weights.bin", "--token-rows", weights / "crab/unsaved_state.npz")
    (model / "params/d/of-an-older-model").write_bytes(b"replaced with the folder")
    run("import", *released, *crab, *sizes, "--out", model)
    assert not (model / "params/d/of-an-older-model").exists()
    run("verify", model, "--outputs", bucket.at("llama.npz"), "--prefix", "lora.")
    for form in ("crab", "hf"):
        run("export", model, "--format", form, "--out", back / form)
        run("export", model, "--format", form, "--out", tmp_path / form)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.bin"))
    assert "crab/finetune_weights.bin" in written
    for name in (*written, "hf/llama/model.safetensors"):
        assert (back / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.fixture(scope="module")
def release(bucket, raw, tmp_path_factory):
    """The release of AVE with the films of two scenes, in the bucket."""
    root = tmp_path_factory.mktemp("release")
    rows = ("Church bell&RUhOCu3LNXM&good&0&10", "Banjo&0f_iTO5t3hU&good&2&4")
    (root / "ave/AVE").mkdir(parents=True)
    (root / "ave/trainSet.txt").write_text("\n".join(rows) + "\n")
    for number, row in enumerate(rows):
        film = raw / f"train/00000{number}/clip.mp4"
        (root / "ave/AVE" / f"{row.split('&')[1]}.mp4").write_bytes(film.read_bytes())
    return bucket.upload(root, "release")


def test_an_index_of_a_release_in_a_bucket_is_used_until_a_file_comes_or_goes(release, caplog):
    words = ("--root", release, "--datasets", "ave", "--splits", "train")
    assert "2 examples" in said_by(index.run, *words)
    examples = index.read(release, index.Wanted("train", ("ave",), "train", "all", "raise"))
    assert isinstance(examples, index.Indexed)
    assert [example.id for example in examples] == [e.id for e in datasets.read(release, "ave", "train")]
    (release / "ave/AVE/more.mp4").write_bytes(b"a film")
    assert index.opened(release, "ave", "train", "train") is None and "is older than" in caplog.text
    (release / "ave/AVE/more.mp4").unlink()
    assert index.opened(release, "ave", "train", "train"), "the folder is as it was"


def test_parts_are_prepared_and_merged_in_a_bucket_as_on_a_disk(bucket, release, tmp_path, capsys):
    small = ("--datasets", "ave", "--splits", "train", "--image-size", "32", "--video-frames", "2", "--workers", "0")
    for out in (bucket.at("parts"), tmp_path / "parts"):
        for number in (1, 0):
            prepare.run(["--root", str(release), "--out", str(out), *small, "--part", f"{number}/3"])
        with pytest.raises(InputError, match="part 2/3.* was not run"):
            prepare.run(["--out", str(out), "--merge"])
        prepare.run(["--root", str(release), "--out", str(out), *small, "--part", "2/3"])
        prepare.run(["--out", str(out), "--merge", "--workers", "0"])
    assert not list((bucket.at("parts") / "parts").iterdir()), "the parts have become a whole"
    names = {path.relative_to(tmp_path / "parts").as_posix() for path in (tmp_path / "parts").rglob("*.array_record-*")}
    assert names and all((bucket.at("parts") / n).read_bytes() == (tmp_path / "parts" / n).read_bytes() for n in names)
    assert shards.opened(bucket.at("parts")).manifest["shards"] == shards.opened(tmp_path / "parts").manifest["shards"]
    prepare.run(["--root", str(release), "--out", str(bucket.at("parts")), *small])
    assert "shards exist already" in capsys.readouterr().err
