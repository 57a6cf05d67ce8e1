"""Whatever lies in the place of a structured file, it is read or refused with one line, and never hangs."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crab_jax.io import structured
from crab_jax.io.bounds import Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import wrong_fields
from tests.programs import hostile_files
from tests.programs.hostile_files import KINDS, Tally, changed, file_of, text_of, verdict

NAMED = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


def failures(tally):
    return [line for lines in tally.failed.values() for line in lines]


@NAMED
def test_a_sound_file_is_read_with_and_without_a_byte_order_mark(kind, tmp_path):
    for mark in ("",) if kind.name in ("answers.journal", "tokenizer.json") else ("", "\ufeff"):
        path = file_of(kind, tmp_path)
        path.write_text(mark + text_of(kind))
        kind.read(path)


@NAMED
def test_hostile_contents_are_refused_in_one_line(kind, tmp_path):
    tally = Tally()
    hostile_files.try_contents(kind, tmp_path, tally)
    assert failures(tally) == [] and sum(tally.tried.values()) > 40


@NAMED
def test_hostile_fields_are_refused_or_read(kind, tmp_path):
    tally = Tally()
    hostile_files.try_fields(kind, tmp_path, tally, 60)
    assert failures(tally) == []


@pytest.mark.parametrize("attempt", ["try_weights", "try_indices", "try_zips"])
def test_hostile_weights_indices_and_zips_are_refused_in_one_line(attempt, tmp_path):
    tally = Tally()
    getattr(hostile_files, attempt)(tmp_path, tally)
    assert failures(tally) == []


@NAMED
def test_mutations_are_refused_or_read(kind, tmp_path):
    sound, path = text_of(kind).encode(), file_of(kind, tmp_path)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, len(sound)),
                st.integers(0, 40),
                st.binary(max_size=4) | st.sampled_from([b"{", b"]", b'"', b"null", b"-1", b"1e999", b"[[", b'"":']),
            ),
            min_size=1,
            max_size=4,
        )
    )
    def check(cuts):
        data = sound
        for at, length, new in cuts:
            data = data[:at] + new + data[at + length :]
        path.write_bytes(data)
        assert verdict(kind.read, path, may_be_read=True) == ""

    check()


def test_a_schema_names_the_field_and_what_it_must_be():
    schema = {"a": [{"b?": Whole(1, 9)}], "c": structured.Each(Text(1), structured.Null(Text()))}
    structured.check({"a": [{"b": 1}, {}], "c": {"x": None}, "more": 1}, schema, "f")
    for at, new, said in (
        (("a", 0, "b"), 10, r"f \[a\[0\].b\]: is 10; must be a whole number from 1 to 9"),
        (("a", 0), 5, r"f \[a\[0\]\]: is 5; must be an object"),
        (("c",), [], "must be an object"),
        (("a",), None, r"f \[a\]: is None; must be a list"),
        (("c", "x"), 1, r"f \[c.x\]: is 1"),
    ):
        with pytest.raises(InputError, match=said):
            structured.check(changed({"a": [{"b": 1}], "c": {"x": None}}, at, new), schema, "f")
    with pytest.raises(InputError, match=r"f \[c\]: is missing"):
        structured.check({"a": []}, schema, "f")


def test_brackets_are_counted_to_the_bound_and_not_beyond():
    for depth, held in ((structured.DEPTH, True), (structured.DEPTH + 1, True), (structured.DEPTH + 2, False)):
        text = "[" * depth + "]" * depth
        if held:
            assert structured.strict_json(text) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="too deep"):
                structured.strict_json(text)


def test_links_of_a_hugging_face_cache_lead_to_its_blobs(tmp_path):
    folder, blobs = tmp_path / "models--x/snapshots/1", tmp_path / "models--x/blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b").write_bytes(hostile_files.safetensors({"w": hostile_files._tensor()}, bytes(8)))
    (folder / "a.safetensors").symlink_to("../../blobs/b")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    assert structured.shard_index(index) == {"w": "a.safetensors"}


HOSTILE = (
    None,
    True,
    -1,
    10**300,
    1e308,
    float("nan"),
    float("inf"),
    " ",
    [[]],
    [None],
    [["a"]],
    [["a", 0, 11]],
    [["a", -1, 3]],
    [["a", 1.5, 3]],
    [["a", "1", "3"]],
    [[[], 0, 3]],
    [["a", 0, float("inf")]],
    [10, 10, 5, 5],
    [0, 0, 1e9, 1],
    [0, 0, 10**300, 1],
    [0, 0, float("nan"), 1],
    [-5, 0, 10, 10],
    11,
    {"a": 1},
)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_label_takes_a_value_of_another_kind(task):
    for name in task.label:
        if name == "video":  # null where the clip has no name, and any text
            continue
        for value in HOSTILE:
            found = list(wrong_fields(task, {name: value}, ()))
            assert [wrong for wrong, *_ in found] == [name], (name, value)
