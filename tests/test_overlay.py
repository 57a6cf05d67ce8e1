"""Overlays put masks, boxes and events exactly where the answer says."""

import io

import numpy as np
from PIL import Image

from crab_jax.tasks.avs_classes import avss_palette
from crab_jax.visualize import overlay

GREY = np.full((4, 6, 3), 100, np.uint8)


def test_probabilities_are_enlarged_then_cut_at_one_half():
    mask = np.array([[0.0, 0.2], [0.9, 1.0]], np.float32)
    large = overlay.resize_mask(mask, (6, 4))  # width, height
    assert large.shape == (4, 6) and large.dtype == bool
    np.testing.assert_array_equal(large[:, 0], [False, False, True, True])


def test_class_ids_keep_their_values():
    large = overlay.resize_mask(np.array([[0, 70], [7, 0]], np.int32), (4, 2))
    np.testing.assert_array_equal(large, [[0, 0, 70, 70], [7, 7, 0, 0]])


def test_outline_is_the_border_of_each_region():
    mask = np.zeros((5, 5), bool)
    mask[:4, 1:] = True
    inner = overlay.outline(mask)
    np.testing.assert_array_equal(np.argwhere(mask & ~inner), [[1, 2], [1, 3], [2, 2], [2, 3]])
    assert overlay.outline(mask, width=2).sum() == mask.sum()


def test_regions_of_two_classes_are_told_apart():
    classes = np.array([[1, 1, 1, 2, 2, 2]] * 6)
    assert overlay.outline(classes)[2:4, 2:4].all() and not overlay.outline(classes)[2:4, [1, 4]].any()


def test_a_binary_mask_blends_its_colour_and_leaves_the_rest_alone():
    mask = np.zeros((4, 6), bool)
    mask[:3, :3] = True
    drawn = overlay.overlay_mask(GREY, mask, (200, 0, 0), alpha=0.5)
    np.testing.assert_array_equal(drawn[~mask], GREY[~mask])
    np.testing.assert_array_equal(drawn[1, 1], [150, 50, 50])
    np.testing.assert_array_equal(drawn[0, 0], [200, 0, 0])


def test_a_semantic_mask_takes_the_class_colours():
    drawn = overlay.overlay_mask(GREY, np.where(np.arange(6) < 1, 23, 0) * np.ones((4, 1), int))
    np.testing.assert_array_equal(drawn[:, 0], np.tile(avss_palette()[23], (4, 1)))
    np.testing.assert_array_equal(drawn[:, 1:], GREY[:, 1:])


def test_mask_files_hold_the_mask():
    binary = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(overlay.mask_png(binary)))), 255 * binary)
    classes = Image.open(io.BytesIO(overlay.mask_png(np.array([[0, 5], [70, 1]]))))
    np.testing.assert_array_equal(np.array(classes), [[0, 5], [70, 1]])
    np.testing.assert_array_equal(np.array(classes.convert("RGB"))[1, 0], avss_palette()[70])


def test_boxes_scale_from_the_224_square_to_the_picture():
    assert overlay.scale_box((0, 0, 224, 224), (1280, 720)) == (0, 0, 1280, 720)
    assert overlay.scale_box((56, 112, 112, 168), (448, 224)) == (112, 112, 224, 168)
    assert overlay.scale_box((300, -5, 112, 112), (224, 224)) == (112, 0, 224, 112)


def test_a_box_is_drawn_inside_its_edges():
    picture = np.zeros((100, 100, 3), np.uint8)
    drawn = overlay.overlay_boxes(picture, [((56, 56, 112, 168), (9, 9, 9), "")])
    rows, columns = np.nonzero(drawn[..., 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 74, 25, 49)
    assert not drawn[30, 30].any()


def test_an_empty_box_draws_nothing():
    picture = np.zeros((50, 50, 3), np.uint8)
    assert not overlay.overlay_boxes(picture, [((20, 20, 20, 90), (9, 9, 9), "label")]).any()


def test_events_of_answers_and_labels_become_the_same_tracks():
    answer = overlay.event_tracks("ave", {"event": "Bell", "ranges": [[2, 5]]})
    assert (
        answer
        == overlay.event_tracks("ave", {"event": "Bell", "start": 2, "end": 5})
        == [overlay.Track("Bell", ((2, 5),))]
    )
    tracks = overlay.event_tracks("avvp", {"audio": [["Car", 0, 3], ["Car", 6, 12]], "visual": [["Dog", 4, 4]]})
    assert [(t.label, t.spans) for t in tracks] == [("Car (heard)", ((0, 3), (6, 10))), ("Dog (seen)", ())]
    assert overlay.event_tracks("ave", None) == []


def test_a_bar_of_the_time_line_spans_its_seconds():
    def painted(end):
        """Columns of the picture that the bar of an event from 0 to `end` covers."""
        track = overlay.Track("x", ((0.0, end),), (200, 0, 0))
        png = overlay.timeline(np.zeros(16000, np.float32), np.zeros((10, 8, 8, 3), np.uint8), [track], 10.0)
        rgb = np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        return (np.abs(rgb - [200, 0, 0]).sum(-1) < 10).any(0).sum()

    assert abs(painted(5.0) / painted(10.0) - 0.5) < 0.01


def test_pictures_of_any_size_stand_side_by_side():
    row = overlay.side_by_side([(GREY, "a"), (np.zeros((8, 8, 3), np.uint8), "b")], height=40)
    assert row.shape == (44, 60 + 1 + 40, 3)
    assert (row[4:, :60] == 100).all() and (row[4:, 61:] == 0).all()
