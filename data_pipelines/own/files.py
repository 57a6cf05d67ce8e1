"""Media that a table names: finding them below the data root, copying them there, and their length."""

from __future__ import annotations

import dataclasses
import filecmp
import functools
import io
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import av

from crab_jax.io import paths
from crab_jax.io.files import whole, write_whole
from data_pipelines import media
from data_pipelines.own.table import Row
from data_pipelines.sources.own import PICTURES

SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".au", ".w64")
PHOTOS = (*PICTURES, ".gif", ".tif", ".tiff", ".heic")


@dataclasses.dataclass(frozen=True)
class Media:
    """Finds the files that a table names.

    root: the data root. folder: of the table. copy: whether to copy files from outside of the root. overwrite: whether
    a copy may replace another file. moments: path -> (video, second, parts) of pictures that `write_moments` writes.
    """

    root: Path
    folder: Path
    copy: bool = False
    overwrite: bool = False
    moments: dict[str, tuple[str, int, int]] = dataclasses.field(default_factory=dict)

    def moment(self, video: str, second: int, parts: int) -> str:
        """Return the path of the picture at a second of a video, which `write_moments` will write."""
        path = f"media/{video.replace('/', '_')}_{second}.png"
        self.moments[path] = video, second, parts
        return path

    def write_moments(self) -> None:
        """Write the frames of videos that rows ask about."""
        for path, (video, second, parts) in self.moments.items():
            png = io.BytesIO()
            media.moment_picture(paths.local(self.root / video), second, parts).save(png, "PNG")
            write_whole(self.root / path, png.getvalue())

    def find(self, row: Row, field: str, given: Any) -> str:
        """Return the path of a file relative to the root, copied there if `copy` is set. Raises InputError."""
        if not isinstance(given, str):
            raise row.error(field, f"is {given!r:.60}, not a path", "write it in quotes")
        if "://" in given and not paths.is_remote(given.strip()):
            raise row.error(field, f"is the address {given!r:.80}", "download the file, and give its path")
        kinds = [given.strip(), given.strip().replace("\\", "/")]
        source = next(
            (
                path
                for text in kinds
                for base in (self.folder, self.root)
                if _is_there(path := paths.named_in(base, text))
            ),
            None,
        )
        if source is None:
            raise row.error(
                field,
                f"no such file {given!r:.120}",
                f"give its path from the folder of the table ({self.folder}) or from --root",
            )
        if field != "frames" and not source.is_file():
            raise row.error(
                field,
                f"{given!r:.120} is a folder",
                "give a file" + (", or the folder in the column `frames`" if field in ("media", "video") else ""),
            )
        real, root = paths.real(source), paths.real(self.root)
        for full, base in ((paths.normal(source), paths.normal(self.root)), (real, root)):
            if real.startswith(f"{root}/") and full.startswith(f"{base}/"):
                return full.removeprefix(f"{base}/")
        if not self.copy:
            raise row.error(
                field,
                f"{given!r:.120} lies outside of --root {self.root}",
                "put it there, or give --copy to have it copied",
            )
        return self._copied(row, field, source, kinds[1])

    def _copied(self, row: Row, field: str, source: Path, given: str) -> str:
        parts = [part for part in re.split(r"[/\\]|^(?:[A-Za-z]|gs|s3):", given) if part not in ("", ".", "..", "~")]
        inside = "/".join(("media", *parts))
        target = self.root / inside
        if source.is_dir():
            for file in sorted(source.iterdir()):
                if file.name.lower().endswith(PICTURES):
                    self._copied(row, field, file, f"{given.rstrip('/')}/{file.name}")
            return inside
        same = target.is_file() and filecmp.cmp(paths.local(source), paths.local(target), shallow=False)
        if target.is_file() and not same and not self.overwrite:
            raise row.error(field, f"{target} is another file", "give --overwrite to replace it")
        if not same:
            with whole(target) as partial:
                shutil.copyfile(paths.local(source), partial)
        return inside

    def sources(self, row: Row) -> dict[str, str]:
        """Return the video, frames, image and audio of a row: from their own columns, and from `media` by file type."""
        named = [(field, row.given(field)) for field in ("video", "frames", "image", "audio") if row.given(field)]
        several = row.given("media")
        for path in (
            several
            if isinstance(several, list)
            else re.split(r"\s*[;|\n]\s*", several)
            if isinstance(several, str)
            else [several]
            if several is not None
            else []
        ):
            suffix = PurePosixPath(path).suffix.lower() if isinstance(path, str) else ""
            named.append(("image" if suffix in PHOTOS else "audio" if suffix in SOUNDS else "video", path))
        sources: dict[str, str] = {}
        for field, path in named:
            if field in sources:
                raise row.error(field, f"is given twice, {sources[field]!r:.60} and {path!r:.60}", "keep one")
            sources[field] = self.find(row, field, path)
        if "video" in sources and "frames" in sources:
            raise row.error("frames", "are given beside a video", "give one clip")
        return sources


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # of a disk: the name is too long
        if paths.is_remote(path):
            raise
        return False


@functools.lru_cache(1 << 16)
def facts(file: str, field: str) -> tuple[float, bool]:
    """Return (seconds, whether there is sound) of a video or a sound file. Raises InputError."""
    path = str(paths.local(file))
    if field == "video":
        clip = media.timing(path)
        return clip.seconds, clip.sound is not None
    with media.opened(path, field) as container:
        stated, has_sound = (container.duration or 0) / av.time_base, media.sound_of(container) is not None
    return stated or (len(media.read_audio(path)) / media.SAMPLE_RATE if has_sound else 0.0), has_sound
