"""Parts of one preparation, on many machines: merged they are what one run writes, or one line says what is missing."""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys

import pytest

from crab_jax.io.errors import InputError
from data_pipelines import datasets, parts, prepare, shards
from data_pipelines.parts import Part

SMALL = ("--image-size", "16", "--video-frames", "4", "--workers", "0", "--splits", "train")


def words(root, out, *options):
    return ["--root", str(root), "--out", str(out), *SMALL, *options]


def run(root, out, *options):
    prepare.run(words(root, out, *options))
    return out


def refused(capsys, arguments):
    """The one line that ends a command with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare.main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def content(root):
    """Digests of everything in a folder."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def two_media_a_shard(monkeypatch):
    monkeypatch.setattr(prepare, "_bytes_of", lambda medium, decoding: 400_000)


@pytest.fixture
def source(copied, tmp_path):
    """A root with two releases, in files of its own."""
    shutil.copytree(copied("ave", "avsbench_semantic"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def whole(source, tmp_path):
    """What a run without parts writes."""
    return run(source, tmp_path / "whole", "--shard-mb", "1")


def child(arguments, log, dies_at):
    """Run a part as a process of its own, which kills itself before medium number `dies_at` of its share (0: never)."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    decode, seen = prepare.record_of, []

    def dies(*one):
        seen.append(one)
        if len(seen) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*one)

    prepare._bytes_of, prepare.record_of = (lambda medium, decoding: 400_000), dies
    try:
        prepare.main(arguments)
    finally:
        sys.stdout.flush()


def test_four_parts_at_once_of_which_two_are_killed_are_what_one_run_writes(source, whole, tmp_path, capsys):
    out, context = tmp_path / "out", multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.prepare"])

    def start(number, dies_at=0):
        arguments = words(source, out, "--shard-mb", "1", "--part", f"{number}/4")
        process = context.Process(target=child, args=(arguments, tmp_path / f"log{number}", dies_at))
        process.start()
        return process

    first = [start(number, dies_at=4 if number in (1, 3) else 0) for number in range(4)]
    for process in first:
        process.join(120)
    assert [process.exitcode for process in first] == [0, -signal.SIGKILL, 0, -signal.SIGKILL]
    with pytest.raises(InputError, match="is not completely prepared"):
        datasets.read_examples(out, "train")
    line = refused(capsys, ["--out", str(out), "--merge"])
    assert "part 1/4]: is not finished" in line and "run prepare with --part 1/4" in line
    again = [start(number) for number in (1, 3)]
    for process in again:
        process.join(120)
    assert [process.exitcode for process in again] == [0, 0]
    for number in (1, 3):
        told = (tmp_path / f"log{number}").read_text()
        assert "shards exist already" in told and "media is there" in told, "the plan of the first part is followed"
    prepare.run(["--out", str(out), "--merge"])
    assert content(out) == content(whole), "nothing differs, not even times or versions"
    prepare.run(["--out", str(out), "--merge"])
    assert "is merged already" in capsys.readouterr().err and content(out) == content(whole)


def test_parts_in_folders_of_their_own_are_copied_into_one_and_merged(source, whole, tmp_path):
    for number in range(3):
        own = run(source, tmp_path / f"own{number}", "--shard-mb", "1", "--part", f"{number}/3")
        shutil.copytree(own, tmp_path / "out", dirs_exist_ok=True)
    prepare.run(["--out", str(tmp_path / "out"), "--merge"])
    assert content(tmp_path / "out") == content(whole)


def test_another_number_of_parts_goes_on_with_what_is_there_and_may_be_larger_than_that_of_shards(
    source, whole, tmp_path, monkeypatch, capsys
):
    run(source, out := tmp_path / "out", "--shard-mb", "1", "--part", "0/2")
    count = len(json.loads((whole / "prepared.json").read_text())["shards"])
    many, decode, decoded = count + 2, prepare.record_of, []
    monkeypatch.setattr(prepare, "record_of", lambda *one: decoded.append(one) or decode(*one))
    for number in range(many):
        run(source, out, "--shard-mb", "1", "--part", f"{number}/{many}")
    assert f"part {many - 1}/{many} has 0 media, 0.00 GB in 0 shards" in capsys.readouterr().out
    assert 0 < len(decoded) < json.loads((whole / "prepared.json").read_text())["records"]
    prepare.run(["--out", str(out), "--merge"])
    assert content(out) == content(whole)


def test_parts_run_side_by_side_but_not_one_twice_nor_with_other_settings(source, whole, tmp_path, monkeypatch, capsys):
    out, decode, told = tmp_path / "out", prepare.record_of, []

    def meanwhile(*one):
        if not told:
            told.append(refused(capsys, words(source, out, "--shard-mb", "1", "--part", "0/2")))
            told.append(refused(capsys, words(source, out, "--shard-mb", "1", "--part", "1/2", "--clock", "counted")))
            told.append(refused(capsys, words(source, out, "--shard-mb", "1", "--part", "1/3")))
            told.append(refused(capsys, ["--out", str(out), "--merge"]))
            monkeypatch.setattr(prepare, "record_of", decode)
            run(source, out, "--shard-mb", "1", "--part", "1/2")
        return decode(*one)

    monkeypatch.setattr(prepare, "record_of", meanwhile)
    run(source, out, "--shard-mb", "1", "--part", "0/2")
    assert f"is in use by process {os.getpid()} on" in told[0]
    assert "[clock]: is 'counted', of process" in told[1]
    assert "[number of parts]: is 3, of process" in told[2]
    assert "is in use by process" in told[3]
    prepare.run(["--out", str(out), "--merge"])
    assert content(out) == content(whole)


def test_what_keeps_parts_from_being_merged_is_one_line(source, tmp_path, capsys):
    out, merge = tmp_path / "out", ["--out", str(tmp_path / "out"), "--merge"]
    assert "holds no parts; run prepare with --part 0/N" in refused(capsys, merge)
    run(source, out, "--part", "0/3")
    run(source, out, "--part", "2/3")
    line = refused(capsys, merge)
    assert "part 1/3]: was not run; run prepare with --part 1/3 and the options of the others" in line
    assert "[image_size]: was prepared with 16, not 8" in refused(
        capsys, words(source, out, "--part", "1/3", "--image-size", "8")
    )
    other = run(source, tmp_path / "other", "--part", "1/3", "--pad-short-audio")
    note = parts.note_file(out, Part(1, 3))
    shutil.copy(parts.note_file(other, Part(1, 3)), note)
    assert "part 1/3, pad_short_audio]: was prepared with True, the plan has False" in refused(capsys, merge)
    run(source, out, "--part", "1/3")
    kept = json.loads(note.read_text())
    for change, message in (
        ({"plan": "0" * 32}, "part 1/3]: follows another plan"),
        ({"versions": kept["versions"] | {"av": "1.0"}}, "part 1/3]: was decoded with av 1.0, part 0/3 with"),
    ):
        note.write_text(json.dumps(kept | change))
        assert message in refused(capsys, merge)
    note.write_text(json.dumps(kept))

    plan = prepare.kept_plan(out, prepare._settings_in(out))
    shard = out / Part(2, 3).share(plan.shards)[0].file
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert f"part 2/3]: {shard.relative_to(out)} is not what it wrote" in refused(capsys, merge)
    os.utime(shard, (1, 1))  # as if it had not been touched: only --verify reads it
    assert "is not what it wrote" in refused(capsys, [*merge, "--verify"])
    assert not (out / shards.MANIFEST).exists()
    run(source, out, "--part", "2/3", "--verify")
    assert shard.read_bytes() == before
    prepare.run(merge)
    assert datasets.read_examples(out, "train") == datasets.read_examples(source, "train")


def test_a_plan_is_made_again_when_the_source_has_changed(source, tmp_path, capsys):
    run(source, out := tmp_path / "out", "--part", "0/2")
    clip = source / datasets.read_examples(source, "train", ["ave"])[0].video
    data = clip.read_bytes()
    clip.unlink()
    clip.write_bytes(data)
    os.utime(clip, (9, 9))
    annotations = source / "ave" / "trainSet.txt"
    text = annotations.read_text()
    annotations.unlink()
    annotations.write_text(text + text.splitlines()[-1].replace("&", "x&", 1) + "\n")
    run(source, out, "--part", "1/2")
    assert "media is there" not in capsys.readouterr().err
    assert "part 0/2]: follows another plan" in refused(capsys, ["--out", str(out), "--merge"])
    run(source, out, "--part", "0/2")
    prepare.run(["--out", str(out), "--merge"])
    assert content(out) == content(run(source, tmp_path / "whole"))
    (out / "parts").mkdir()
    (out / "parts" / "plan.jsonl").write_text('{"digest": 3}\n')
    run(source, out, "--part", "0/1")  # a damaged plan is made again
    prepare.run(["--out", str(out), "--merge"])
    assert content(out) == content(tmp_path / "whole")


def test_a_root_that_has_moved_is_extended_and_another_one_is_refused(source, tmp_path, monkeypatch, capsys):
    run(source, out := tmp_path / "out", "--datasets", "ave", "--part", "0/1")
    assert str(source) not in (out / "plan.json").read_text() + (out / "parts" / "plan.jsonl").read_text()
    prepare.run(["--out", str(out), "--merge"])
    old = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({"root": str(source), **old}))  # as earlier versions wrote it
    before, decode, decoded = content(out), prepare.record_of, []
    other = tmp_path / "copied without times"
    shutil.copytree(source, other, copy_function=shutil.copyfile)
    line = refused(capsys, words(other, out, "--datasets", "ave"))
    assert "is not what" in line and "rsync -a" in line
    shutil.move(source / "ave", tmp_path / "ave")
    assert "lacks ave, with which" in refused(capsys, words(source, out, "--datasets", "s4"))
    assert content(out) == before
    shutil.move(tmp_path / "ave", source / "ave")
    moved = shutil.move(source, tmp_path / "moved")
    monkeypatch.setattr(prepare, "record_of", lambda *one: decoded.append(one[0].path) or decode(*one))
    run(moved, out, "--datasets", "ave,s4")
    assert decoded and not any(path.startswith("ave/") for path in decoded)
    assert content(out) == content(run(moved, tmp_path / "whole", "--datasets", "ave,s4"))


def test_a_restart_reads_no_shard_that_was_not_touched(source, tmp_path, monkeypatch):
    run(source, out := tmp_path / "out", "--datasets", "ave")
    hashed, checksum = [], shards.sha256
    monkeypatch.setattr(shards, "sha256", lambda path: hashed.append(path) or checksum(path))
    run(source, out, "--datasets", "ave")
    assert not hashed
    run(source, out, "--datasets", "ave", "--verify")
    assert len(hashed) == len(json.loads((out / "prepared.json").read_text())["shards"]) > 1
    touched = hashed[0]
    os.utime(touched)
    hashed.clear()
    for _ in range(2):
        run(source, out, "--datasets", "ave")
    assert hashed == [touched], "once: then it is known to be whole"


def test_every_shard_is_in_one_part_and_parts_are_named_as_schedulers_do():
    items = list(range(11))
    for count in (1, 3, 11, 20):
        shares = [Part(number, count).share(items) for number in range(count)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert parts.read_part("07/8", {}) == Part(7, 8)
    assert parts.read_part("auto", {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "4"}) == Part(1, 4)
    assert parts.read_part("auto", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}) == Part(0, 2)
    for text in ("8/8", "1", "/8", "-1/8", "$SLURM_ARRAY_TASK_ID/8", "1/0", "a/b", "1/2/3", "auto", "0/1000000"):
        with pytest.raises(argparse.ArgumentTypeError):
            parts.read_part(text, {"SLURM_PROCID": "0"})  # of a batch script that srun did not start
    for arguments, message in (
        (["--out", "x"], r"\[--root\]: is missing"),
        (["--out", "x", "--merge", "--part", "0/2"], "does not go with --part"),
    ):
        with pytest.raises(InputError, match=message):
            prepare.parse_arguments(arguments)
