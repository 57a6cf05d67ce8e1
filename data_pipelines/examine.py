"""Examination of one media file by decoding all of it, whatever it is used for.

`examine` runs in processes that may crash on a file (isolated.py), so this module imports nothing but decoders.
"""

from __future__ import annotations

import contextlib
import dataclasses

import av
import numpy as np

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from data_pipelines import media
from data_pipelines.status import CORRUPT, WARNING

COVERED = 0.9  # share of a mask's border that objects rarely cover
LATE = 0.1  # tolerated difference in length of sound and pictures, as a share of the longer
LATE_SECONDS = 0.25  # the difference is tolerated up to this in any case: encoders pad by some frames
FRAMES = 10  # frames per video by default (`data.video_frames`)
USES = ("video", "audio", "picture", "binary", "semantic")  # the last two are kinds of masks


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a file.

    problems: (use, text) pairs; each text starts with its kind, as in `Problem`. seconds: length of a video's pictures,
    0 if not examined. samples: of its sound at 16 kHz. start: seconds from its first picture to its first sample. size:
    (width, height) of its pictures, upright. turned: whether EXIF rotates or flips the picture.
    """

    problems: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    samples: int = 0
    start: float = 0.0
    size: tuple[int, int] | None = None
    turned: bool = False


def examine(task: tuple[str, str, tuple[str, ...]]) -> Facts:
    """Return the Facts of (data root, path, uses of the file). No fault of the file raises an exception.

    Raises OSError for a file that a bucket does not give.
    """
    root, path, uses = task
    file, facts = str(paths.local(paths.at(root) / path)), Facts()
    for use in uses:
        try:
            seen = _LOOK[use](file)
        except InputError as error:
            seen = Facts(((use, f"{CORRUPT}: {error.problem}"),))
        except Exception as error:  # an unexpected error of a decoder
            seen = Facts(((use, f"{CORRUPT}: cannot be decoded ({type(error).__name__}: {str(error):.100})"),))
        facts = Facts(
            facts.problems + seen.problems,
            facts.seconds or seen.seconds,
            facts.samples or seen.samples,
            facts.start or seen.start,
            facts.size or seen.size,
            facts.turned or seen.turned,
        )
    return facts


def _video(path: str) -> Facts:
    media.read_video(path, FRAMES, 16)
    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as messages:
        shown = media.watch(path)
    problems = []
    if shown.damaged:
        problems.append(f"{CORRUPT}: {shown.damaged} of {shown.frames} frames are damaged")
    elif messages:
        problems.append(f"{WARNING}: the decoder says {messages[0][2].strip()!r:.100}")
    with contextlib.suppress(InputError):  # errors of the sound are reported for the use "audio"
        problems += [f"{WARNING}: {remark}" for remark in media.timing(path)._replace(sound=None).remarks()]
    return Facts(tuple(("video", problem) for problem in problems), shown.seconds, size=shown.size)


def _audio(path: str) -> Facts:
    heard = media.hear(path)
    sound, problems = heard.samples, []
    if (peak := float(np.abs(sound).max())) < media.SILENT and media.cancels(path):
        problems.append(
            f"{WARNING}: is silent: its channels cancel each other out, and their mean is read; export it as mono"
        )
    elif peak < media.SILENT:
        problems.append(f"{WARNING}: is silent (the loudest sample is {peak:.1g} of full scale)")
    if remark := heard.start_remark():
        problems.append(f"{WARNING}: {remark}")
    return Facts(tuple(("audio", problem) for problem in problems), heard.seconds, len(sound), heard.start)


def _picture(path: str) -> Facts:
    with media.open_picture(path, "picture") as picture:
        media.rgb(picture, path, "picture")
        return Facts(size=picture.size, turned=picture.turned)


def _binary(path: str) -> Facts:
    mask = media.read_mask(path, None, "binary")
    return Facts(_covering(mask), size=(mask.shape[1], mask.shape[0]), turned=media.is_turned(path))


def _covering(mask: np.ndarray) -> tuple[tuple[str, str], ...]:
    """Return a warning for a binary mask [H,W] that covers most of its picture and nearly all of the border."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if border.mean() <= COVERED or mask.mean() <= 0.5:
        return ()
    return (
        (
            "binary",
            f"{WARNING}: {mask.mean():.0%} of the mask is set, its border too: is it inverted, or a photograph?",
        ),
    )


def _semantic(path: str) -> Facts:
    classes = media.read_mask(path, None, "semantic", unknown=-1)
    stray = int((classes < 0).sum())
    warning = f"{WARNING}: {stray} of {classes.size} pixels have a colour of no class; they are read as background"
    return Facts(
        (("semantic", warning),) if stray else (),
        size=(classes.shape[1], classes.shape[0]),
        turned=media.is_turned(path),
    )


def mismatch(first: float, second: float) -> bool:
    """Return whether two lengths, in seconds, differ too much to belong to one clip."""
    return abs(first - second) > max(LATE_SECONDS, LATE * max(first, second))


_LOOK = dict(zip(USES, (_video, _audio, _picture, _binary, _semantic), strict=True))
