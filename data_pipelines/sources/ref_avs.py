"""Ref-AVS (Wang et al. 2024, GeWu-Lab/Ref-AVS): the object an expression refers to, in each of ten pictures of a clip.

    metadata.csv    vid,uid,split,fid,exp (CRLF)
    media/<V>/{audio.wav, frames/0..9.jpg}
    gt_mask/<V>/fid_<fid>/0000{0..9}.png

V is the uid without its object and number, not the column vid: expressions that refer to nothing have their own
folders, `null_c-<vid>` or `null_m-<vid>`, whose masks may be absent. A uid is no key (11 occur twice); a row is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from crab_jax.tasks import ref_avs
from data_pipelines.examples import Example
from data_pipelines.media import EMPTY_MASK
from data_pipelines.sources.release import Found, Release, Row, each

SPLITS = ("train", "val", "test_s", "test_u", "test_n")
UNUSED = "TODO"  # the split of 25 released rows
_UID = re.compile(r"(.+)_([a-z-]+)_[0-9]+")
_NO_EXPRESSION = "G8YSz3L1R3M_75000_85000_boy_1"  # its released expression is an error message of the labelling tool
_PARTS = {"test_s": "seen", "test_u": "unseen", "test_n": "null"}
FRAMES = 10


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `ref-avs`, one per picture; meta: expression, object ("" for nothing), split, video, uid.

    split: one of SPLITS, or "test" for its three parts together. Examples of one row share meta's `one_of`.
    """

    def examples(row: Row) -> Iterator[Example]:
        part = row.one_of("split", (*SPLITS, UNUSED))
        if part != split and not (split == "test" and part in _PARTS) or row.text("uid").strip() == _NO_EXPRESSION:
            return
        video = row.name("vid", "--KCIeTv6PM_14000_24000")
        uid = row.matching("uid", _UID, "--KCIeTv6PM_14000_24000_cat_1")
        folder, named = uid[1], "" if uid[2] == "null" else uid[2]
        fid, expression = row.integer("fid", 0, 10**4), " ".join(row.words("exp").split())
        at = release.inside(f"media/{folder}", row.where, "uid")
        masks = f"gt_mask/{folder}/fid_{fid}"
        frames = tuple(f"{at}/frames/{k}.jpg" for k in range(FRAMES))
        absent = not named and not release.kind(masks)
        line = row.place.rpartition(":")[2]
        for second in range(FRAMES):
            text = ref_avs.instruction(variant, expression, second)
            in_video = "<video>" in text
            yield Example(
                id=f"{line}-{second}",
                task="ref-avs",
                instruction=text,
                target=ref_avs.target(expression, named, second),
                frames=frames if in_video else (),
                image=frames[second] if "<image>" in text else None,
                audio=f"{at}/audio.wav",
                windows="ten",
                second=second,
                mask=EMPTY_MASK if absent else release.inside(f"{masks}/{second:05d}.png", row.where, "fid"),
                mask_kind="binary",
                meta={
                    "expression": expression,
                    "object": named,
                    "video": video,
                    "uid": uid[0],
                    "split": _PARTS.get(part, "seen") if named else "null",
                    "one_of": line,
                    "row": row.place,
                },
            )

    name = release.annotation("metadata.csv")
    return each(release.table(name, ("vid", "uid", "split", "fid", "exp")), examples)
