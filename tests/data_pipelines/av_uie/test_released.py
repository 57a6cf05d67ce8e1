"""The reader of the released labels: exact format, every damage named, and what disagrees left to the verifier."""

import dataclasses
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import ONE_EACH, example

from crab_jax.io.errors import InputError
from crab_jax.tasks.placeholders import MASK
from data_pipelines.av_uie import released, verify
from data_pipelines.sources.scenes import NOTHING

AVE_TEXT = (
    "The video shows a man who speaks. So the audible and visible event in the video is <event> Male speech, "
    "man speaking </event>, and the time range is <range> 0,8 </range>."
)
AVVP_TEXT = (
    "A chainsaw is at work. Therefore, visual and audio events are: <visual>Chainsaw,(0 1),(3 6)</visual> and "
    "<audio>Chainsaw,(0 10)</audio>"
)


def pack(path, entries):
    """A zip of (name, content) pairs."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def speech(id="-abc_DEF123-1", **meta):
    return dataclasses.replace(
        example("ave", {"event": "Male speech, man speaking", "start": 0, "end": 8} | meta),
        id=id,
        video="ave/AVE/-abc_DEF123.mp4",
    )


def attach(path, examples):
    return released.attach(examples, released.read(path))


def test_ave_is_matched_by_video_and_agrees_with_its_row(tmp_path):
    path = pack(
        tmp_path / "ave_converted_label.zip",
        [
            ("converted_label/", ""),
            ("__MACOSX/converted_label/._x.txt", b"\x00\xff"),
            ("converted_label/.DS_Store", "x"),
            ("converted_label/-abc_DEF123.txt", b"\xef\xbb\xbf" + AVE_TEXT.encode() + b"\r\n"),
            ("converted_label/other______.txt", AVE_TEXT),
        ],
    )
    absent = dataclasses.replace(speech("y"), video="ave/AVE/none_______.mp4")
    found = attach(path, [speech(), absent, ONE_EACH["avqa"]])
    assert [one.target for one in found.examples] == [AVE_TEXT] and found.examples[0].meta["reasoning"] == "released"
    assert found.without == ["y"] and found.unused == ["other______"]
    assert verify.problems(found.examples[0]) == []


def test_a_zip_whose_index_lists_fewer_files_than_there_are_is_refused(tmp_path):
    path = pack(tmp_path / "ave_converted_label.zip", [(f"converted_label/{n}.txt", AVE_TEXT) for n in range(3)])
    content = path.read_bytes()
    at = content.rfind(b"PK\5\6") + 10
    for stated, said in ((2, "lists 3 of 2"), (7, "lists 3 of 7")):
        path.write_bytes(content[:at] + stated.to_bytes(2, "little") + content[at + 2 :])
        with pytest.raises(InputError, match=said):
            released.read(path)


def test_two_rows_of_one_video_share_a_label_and_the_other_event_is_quarantined(tmp_path):
    path = pack(tmp_path / "ave_converted_label.zip", [("converted_label/-abc_DEF123.txt", AVE_TEXT)])
    both = attach(path, [speech(), speech("-abc_DEF123-2", event="Bark")]).examples
    good, bad = verify.split(both)
    assert [one.id for one in good] == ["-abc_DEF123-1"]
    assert bad[0][1] == ["the event is 'Male speech, man speaking', the label says 'Bark'"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (AVE_TEXT.replace("<range>", "").replace("</range>", ""), "0 <range> tags"),
        (AVE_TEXT.replace("<event>", "").replace("</event>", ""), "0 <event> tags"),
        (f"{AVE_TEXT} {AVE_TEXT}", "2 <event>"),
        (AVE_TEXT.replace("0,8", "0,9"), "the range is 0,9"),
        (AVE_TEXT.replace("</event>", ""), "do not match"),
    ],
)
def test_released_texts_with_too_few_or_too_many_tags_are_read_and_quarantined(tmp_path, text, reason):
    path = pack(tmp_path / "ave_converted_label.zip", [("converted_label/-abc_DEF123.txt", text)])
    found = verify.problems(attach(path, [speech()]).examples[0])
    assert any(reason in problem for problem in found), found


def test_avvp_tags_that_are_placeholder_tokens_are_renamed(tmp_path):
    path = pack(tmp_path / "avvp_converted_label.zip", [("converted_label/6aV6c8mY0lg.txt", AVVP_TEXT)])
    weak = dataclasses.replace(example("avvp", {"labels": ["Chainsaw"]}), video="llp/video/6aV6c8mY0lg.mp4")
    dense = dataclasses.replace(
        weak, meta={"audio": [["Chainsaw", 0, 10]], "visual": [["Chainsaw", 0, 1], ["Chainsaw", 3, 6]]}
    )
    for one in attach(path, [weak, dense]).examples:
        assert "<visual_event>Chainsaw,(0 1),(3 6)</visual_event>" in one.target and "<audio>" not in one.target
        assert verify.problems(one) == []
    other = dataclasses.replace(weak, meta={"labels": ["Chainsaw", "Speech"]})
    assert verify.problems(attach(path, [other]).examples[0]) == ["the event 'Speech' of the label is missing"]


def test_avqa_is_matched_by_question(tmp_path):
    path = pack(
        tmp_path / "music_avqa_converted_label.zip",
        [("converted_label/4639.txt", "It stands there. So the answer is <answer> saxophone </answer>.")],
    )
    asked = dataclasses.replace(ONE_EACH["avqa"], id="avqa-4639", meta={**ONE_EACH["avqa"].meta, "question_id": 4639})
    assert verify.problems(attach(path, [asked]).examples[0]) == []
    wrong = dataclasses.replace(asked, meta={**asked.meta, "answer": "piano"})
    assert verify.problems(attach(path, [wrong]).examples[0]) == ["the answer is 'saxophone', the label says 'piano'"]


@pytest.mark.parametrize(("name", "task", "entry"), [("AVS", "s4", "s4/v_0.txt"), ("arig", "arig", "v.txt")])
def test_texts_of_undocumented_zips_become_reasoning_before_the_answer(tmp_path, name, task, entry):
    path = pack(tmp_path / f"{name}_converted_label.zip", [(entry, "A dog barks in the middle of the picture.")])
    plain = dataclasses.replace(ONE_EACH[task], meta={**ONE_EACH[task].meta, "video": "v"})
    found = attach(path, [plain]).examples[0]
    assert found.target.startswith("A dog barks in the middle of the picture. ")
    assert verify.problems(found) == [] and (task == "arig" or found.target.endswith(MASK))


def test_an_unpacked_folder_reads_like_its_zip(tmp_path):
    folder = tmp_path / "AVE_Dataset" / "converted_label"
    folder.mkdir(parents=True)
    (folder / "-abc_DEF123.txt").write_text(AVE_TEXT)
    for path in (folder, folder.parent):  # the layout of the released code, named by the user
        assert released.read(path, "ave").texts == {"-abc_DEF123": AVE_TEXT}


LONG = "x" * 200_000
DAMAGED = [
    ("not a zip", b"hello", "cannot be read as a zip"),
    ("../x.txt", "x", "leaves the archive"),
    ("/x.txt", "x", "leaves the archive"),
    ("converted_label/a.json", "{}", "is no .txt file"),
    ("elsewhere/a.txt", "x", "is not in converted_label/"),
    ("converted_label/a.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
    ("converted_label/a.txt", "  \n", "is empty"),
    ("converted_label/a.txt", LONG, "too large"),
]


@pytest.mark.parametrize(("entry", "content", "problem"), DAMAGED)
def test_damage_is_named_with_its_file(tmp_path, entry, content, problem):
    path = tmp_path / "ave_converted_label.zip"
    if entry == "not a zip":
        path.write_bytes(content)
    else:
        pack(path, [(entry, content), ("converted_label/good_______.txt", AVE_TEXT)])
    with pytest.raises(InputError) as caught:
        released.read(path)
    assert caught.value.where == str(path) and problem in caught.value.problem
    if entry != "not a zip":
        assert entry in caught.value.problem
        kept = released.read(path, strict=False)  # the others are read, the damage is still told
        assert list(kept.texts) == ["good_______"] and problem in kept.problems[0]


def test_a_name_twice_and_a_truncated_zip_are_errors(tmp_path):
    path = tmp_path / "ave_converted_label.zip"
    with pytest.warns(UserWarning, match="Duplicate"):
        pack(path, [("converted_label/a.txt", AVE_TEXT), ("converted_label/a.txt", AVE_TEXT)])
    with pytest.raises(InputError, match="is there twice"):
        released.read(path)
    whole = pack(path, [("converted_label/a.txt", AVE_TEXT)]).read_bytes()
    path.write_bytes(whole.replace(b"man speaking", b"MAN SPEAKING", 1))  # the checksum no longer fits
    with pytest.raises(InputError, match="cannot be read as a zip"):
        released.read(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a zip"):
        released.read(path)
    path.write_bytes(
        whole[:6] + b"\x01" + whole[7:].replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    )
    with pytest.raises(InputError, match="is encrypted"):
        released.read(path)


@pytest.mark.parametrize("name", ["labels.zip", "AVE_converted_label.zip", "converted_label.zip"])
def test_a_file_of_another_name_is_not_guessed_at(tmp_path, name):
    path = pack(tmp_path / name, [("converted_label/a.txt", AVE_TEXT)])
    with pytest.raises(InputError, match="none of the released labels"):
        released.read(path)
    assert released.read(path, "ave").texts == {"a": AVE_TEXT}


def test_a_missing_or_empty_zip_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        released.read(tmp_path / "ave_converted_label.zip")
    with pytest.raises(InputError, match="holds no labels"):
        released.read(pack(tmp_path / "avvp_converted_label.zip", []))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(ONE_EACH)),
    st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                [
                    "<event>",
                    "</event>",
                    "<range>",
                    "0,8",
                    "</range>",
                    "<audio>",
                    "</audio>",
                    "Dog,(0 1)",
                    "<answer>",
                    "(1,2)",
                    MASK,
                    "<mask_0>",
                    "The sounding object is",
                    "is",
                    ". The mask",
                    "At the first second in the video, ",
                    NOTHING,
                ]
            ),
            max_size=12,
        ).map(" ".join),
    ),
)
def test_no_text_breaks_the_reader_or_the_verifier(task, text):
    plain = ONE_EACH[task]
    if text.strip() and task != "avcap" and task != "ref-avs":
        plain = dataclasses.replace(
            plain, target=released.target(plain, text), meta={**plain.meta, "reasoning": verify.RELEASED}
        )
    assert all(isinstance(problem, str) for problem in verify.problems(dataclasses.replace(plain, target=text)))
