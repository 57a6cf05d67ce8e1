"""The links between chips: how many bring data to a group, and how chips are grouped to have most of them."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from crab_jax.aot import hlo, links
from crab_jax.parallel import chips, sharding, torus

LINK = 45e9


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    slice_index: int = 0


def slice_of(kind, *sizes):
    return [Chip(place, kind) for place in itertools.product(*map(range, sizes))]


def block(*sizes, step=1):
    return tuple(itertools.product(*(range(0, size * step, step) for size in sizes)))


V5E = torus.Torus((16, 16, 1), (True, True, False))


@pytest.mark.parametrize(
    ("kind", "sizes", "wraps"),
    [
        ("TPU v5 lite", (16, 16, 1), (True, True, False)),
        ("TPU v5 lite", (8, 16, 1), (False, True, False)),
        ("TPU v6 lite", (4, 4, 1), (False, False, False)),
        ("TPU v4", (4, 4, 8), (True, True, True)),
        ("TPU v5", (2, 2, 4), (False, False, False)),
    ],
)
def test_which_axes_wrap_around(kind, sizes, wraps):
    assert torus.torus_of(slice_of(kind, *sizes)) == torus.Torus(sizes, wraps)


def test_chips_that_fill_no_box_or_have_no_places_are_no_torus():
    assert torus.torus_of(slice_of("TPU v4", 2, 2, 1)[:-1]) is None
    assert torus.torus_of([SimpleNamespace(platform="tpu", device_kind="TPU v4")]) is None
    assert torus.torus_of(jax.devices()[:1]) is None


@pytest.mark.parametrize(
    ("group", "lanes"),
    [
        (block(4, 1, 1), 1),  # the end of a line has one neighbour
        (block(2, 2, 1), 2),
        (block(16, 1, 1), 2),  # a ring
        (block(16, 16, 1), 4),
        (block(16, 2, 1), 3),
        (block(4, 1, 1, step=2), 0.5),  # shared with the chips between them
        (block(8, 1, 1, step=2), 1),  # a ring whose links two groups share
        (((0, 0, 0), (1, 1, 0)), 1),  # no block
    ],
)
def test_the_links_of_a_group(group, lanes):
    assert torus.lanes(group, V5E) == lanes


def test_gathering_in_squares_takes_half_of_a_line_and_a_ring_of_sixteen_five_eighths():
    gathered = 30_897_938_432  # bytes of a step of the language model on v5e:16x16
    line, square, ring = (
        torus.seconds("all-gather", gathered, group, V5E, LINK)
        for group in (block(4, 1, 1), block(2, 2, 1), block(16, 1, 1))
    )
    assert line == pytest.approx(0.515, abs=0.001)
    assert square == pytest.approx(line / 2) and ring == pytest.approx(line * 5 / 8)


def test_the_seconds_of_every_kind():
    four = block(4, 1, 1)
    assert torus.seconds("all-reduce", 4, four, V5E, 1) == 2 * torus.seconds("all-gather", 4, four, V5E, 1) == 6
    assert torus.seconds("reduce-scatter", 1, four, V5E, 1) == 3
    assert torus.seconds("all-to-all", 4, four, V5E, 1) == 4, "two chips send two quarters each over the middle"
    assert torus.seconds("all-gather", 4, four[:1], V5E, 1) == 0
    shift = [(n, (n + 1) % 4) for n in range(4)]
    line = tuple((n, 0, 0) for pair in shift for n in pair)
    assert torus.seconds("collective-permute", 5, line, V5E, 1) == 5, "the way back has the links to itself"
    far = tuple((n, 0, 0) for pair in [(0, 2), (1, 3)] for n in pair)
    assert torus.seconds("collective-permute", 5, far, V5E, 1) == 10
    around = tuple((n, 0, 0) for n in (15, 0))
    assert torus.seconds("collective-permute", 5, around, V5E, 1) == 5


def test_groups_of_a_mesh_are_blocks_of_neighbours():
    devices = slice_of("TPU v5 lite", 16, 16, 1)
    mesh = sharding.make_mesh(0, 4, 1, devices)
    assert {chip.coords for chip in mesh.devices[0].flat} == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}
    assert len({chip.coords for chip in mesh.devices.flat}) == 256
    cube = sharding.make_mesh(0, 4, 1, slice_of("TPU v4", 4, 4, 4)).devices[0]
    assert {chip.coords for chip in cube.flat} == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)}, "the chips of a host"
    both = sharding.make_mesh(0, 4, 4, devices).devices[0]
    assert all(torus.lanes(tuple(chip.coords for chip in row), V5E) == 2 for row in both), "tensor: neighbours"
    assert {chip.coords[:2] for chip in both.flat} == set(itertools.product(range(4), range(4)))


@pytest.mark.parametrize(
    ("kind", "sizes", "least", "expected"),
    [
        ("TPU v5 lite", (16, 16, 1), 4, 4),  # 8 and 16 chips have as few links, and gather more
        ("TPU v6 lite", (4, 4, 1), 2, 4),  # a square instead of a pair
        ("TPU v5", (2, 2, 4), 1, 1),
        ("TPU v5 lite", (2, 1, 1), 2, 2),
    ],
)
def test_an_inferred_split_takes_more_chips_where_they_gather_faster(kind, sizes, least, expected):
    devices = slice_of(kind, *sizes)
    assert sharding.most_links(devices, least, len(devices)) == expected


def test_collectives_of_a_program_run_on_the_links_of_their_groups():
    devices = np.array(slice_of("TPU v5 lite", 4, 4, 1), dtype=object).reshape(4, 4, 1)
    mesh = SimpleNamespace(devices=devices)
    chip = chips.chip_of(devices.flat[0])
    array = (hlo.Array("bf16", (4, 1000)),)
    rows = tuple(tuple(range(start, start + 4)) for start in range(0, 16, 4))
    program = [
        hlo.Op("a", "all-gather", array, 10, False, channel="1", groups=rows),
        hlo.Op("b", "all-gather", array, 10, False, channel="1", groups=rows),  # another part of the same
        hlo.Op("c", "all-reduce", array, 1, False, channel="2"),
    ]
    found = links.seconds(program, mesh, chip, 16)
    assert found == pytest.approx({"all-gather": 10 * 6000 / LINK, "all-reduce": 2 * 8000 * 15 / 16 / 2 / LINK})
    crossing = [hlo.Op("d", "all-reduce", array, 1, False, groups=((0, 8), (1, 9)))]
    assert links.seconds(crossing, mesh, chip, 8) == {}
