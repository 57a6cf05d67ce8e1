"""`python -m data_pipelines status`: what is there of every dataset, on whole and on partial copies."""

import json
import subprocess
import sys

import pytest
import releases

from crab_jax.io.errors import InputError
from data_pipelines import __main__ as commands
from data_pipelines.datasets import DATASETS, read
from data_pipelines.status import damage, main, status


def cut(path, share):
    """Replace a file by its beginning; other hard links keep the whole of it."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(len(content) * share)])


def counts_of(root, *names):
    return {(c.dataset, c.split): c for c in status(root, names)[0]}


def test_a_complete_copy_has_no_problems(releases_root):
    counts, problems = status(releases_root)
    assert not problems and {count.dataset for count in counts} == set(DATASETS)
    for count in counts:
        assert count.have == count.annotated == len(read(releases_root, count.dataset, count.split)) > 0
        assert not count.missing and not count.corrupt and not count.malformed


def test_a_partial_copy_is_counted(copied):
    root = copied("ave", "avsbench_semantic", "valor", "llp")
    (root / "ave/AVE/RUhOCu3LNXM.mp4").unlink()
    cut(root / "ave/AVE/0f_iTO5t3hU.mp4", 0.5)  # two rows of train and one of test
    releases.text(root / "ave/valSet.txt", "Frying (food)&MH3m4AwEcRY&good&6\n")
    cut(root / "avsbench_semantic/v1m/3vheOi4y540_1/audio.wav", 0.9)
    (root / "avsbench_semantic/v2/ccccccccccc_3000_13000/labels_rgb/3.png").unlink()
    (root / "valor/desc_val.json").unlink()
    dense = root / "llp/data/AVVP_eval_visual.csv"
    dense.unlink()  # it is a link to the file of all tests
    dense.write_bytes(b"\xff")
    counts, problems = status(root)
    counts = {(c.dataset, c.split): c for c in counts}

    train = counts["ave", "train"]
    assert (train.complete, train.annotated, train.missing, train.corrupt, train.malformed, train.have) == (
        3339,
        5,
        1,
        2,
        0,
        2,
    )
    assert (counts["ave", "val"].malformed, counts["ave", "val"].have) == (1, 0)
    assert (counts["ave", "test"].corrupt, counts["ave", "test"].have) == (1, 1)
    assert (counts["ms3", "test"].corrupt, counts["ms3", "test"].have) == (5, 0)
    assert (counts["avss", "test"].missing, counts["avss", "test"].have) == (1, 9)
    assert "desc_val.json" in counts["valor", "val"].note and counts["valor", "train"].have == 2
    assert "UTF-8" in counts["avvp", "test"].note
    assert counts["ref_avs", "train"].note == "no folder ref_avs/"

    found = {(p.dataset, p.split, p.field, p.problem.split(":")[0]) for p in problems}
    assert {
        ("ave", "train", "video", "missing"),
        ("ave", "train", "video", "corrupt"),
        ("ave", "val", "", "malformed"),
        ("ms3", "test", "audio", "corrupt"),
        ("avss", "test", "mask", "missing"),
        ("valor", "val", "", "missing"),
        ("avvp", "test", "", "malformed"),
    } <= found
    missing = next(p for p in problems if (p.dataset, p.split, p.field) == ("ave", "train", "video"))
    assert (missing.id, missing.path) == ("ave/trainSet.txt:1", str(root / "ave/trainSet.txt:1"))
    assert "ave/AVE/RUhOCu3LNXM.mp4" in missing.problem


def boxes(content):
    """(start, end) of the boxes of the outermost level of an mp4."""
    at = 0
    while at < len(content):
        end = at + int.from_bytes(content[at : at + 4], "big")
        yield at, end
        at = end


def test_damage_is_seen_from_the_outline(releases_root, tmp_path):
    clip = (releases_root / "own/media/test.mp4").read_bytes()
    edges = list(boxes(clip))
    assert len(edges) >= 3 and edges[-1][1] == len(clip)
    whole = {
        "a.mp4": clip,
        "a.wav": (releases_root / "own/media/test.wav").read_bytes(),
        "a.jpg": (releases_root / "own/media/test_frames/frame1.jpg").read_bytes(),
        "a.png": next((releases_root / "avsbench_object").rglob("*.png")).read_bytes(),
    }

    def of(name, content):
        (tmp_path / name).write_bytes(content)
        return damage(tmp_path, name, "image" if name[2:] in ("jpg", "png") else "video")

    for name, content in whole.items():
        assert not of(name, content)
        assert "is empty" in of(name, b"")
        assert "web page" in of(name, b"<html>Quota exceeded</html>" * 9)
        assert all(of(name, content[: int(len(content) * share)]) for share in (0.1, 0.5, 0.8))
    for start, end in edges:  # inside of every box, and before the last one
        for length in {start + 4, start + 8, (start + end) // 2, end - 1}:
            assert of("a.mp4", clip[:length]), (start, end, length)
    assert of("a.mp4", clip[: edges[-1][0]])
    assert "cannot be read" in damage(tmp_path, "nothing.jpg", "image")
    assert "cannot be read" in damage(tmp_path, "nothing.mp4", "video")


def test_the_command(copied, tmp_path, capsys):
    root = copied("ave")
    (root / "ave/AVE/RUhOCu3LNXM.mp4").unlink()
    out = tmp_path / "report.json"
    with pytest.raises(SystemExit) as done:
        main(["--root", str(root), "--datasets", "ave", "--json", str(out)])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines()[:2]] == [
        ["dataset", "split", "complete", "annotated", "missing", "corrupt", "malformed", "effective", "N"],
        ["ave", "train", "3,339", "5", "1", "0", "0", "4"],
    ]
    report = json.loads(out.read_text())
    assert [(c["split"], c["have"]) for c in report["counts"]] == [("train", 4), ("val", 1), ("test", 2)]
    assert set(report["problems"][0]) == {"dataset", "split", "id", "path", "field", "problem"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--root", "/no/such/folder"], "--root.*is no folder"),
        ([], "--root"),
        (["--root", ".", "--datasets", "avee"], "avee.*unknown dataset"),
        (["--root", ".", "--datasets", "lvis", "--json", "/dev/null/x.json"], "--json.*folder of the system"),
    ],
)
def test_bad_command_lines_end_in_one_line(argv, message, one_line_error):
    one_line_error(main, argv, message)


def test_verbs(capsys):
    with pytest.raises(InputError, match="unknown verb 'statsu'.*status"):
        commands.main(["statsu"])
    commands.main([])
    assert "python -m data_pipelines status --root R" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "data_pipelines", "status", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--datasets" in done.stdout and "-m data_pipelines status --root" in done.stdout
