"""Size limits of films, sounds and pictures, checked by their headers before anything is decoded.

The defaults fit clips, and films of up to three hours. The environment variable CRAB_JAX_MEDIA_LIMITS raises them, for
one command and the workers that it starts: CRAB_JAX_MEDIA_LIMITS="hours=12 film_megapixels=40".
"""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from crab_jax.io.errors import InputError

VARIABLE = "CRAB_JAX_MEDIA_LIMITS"
LOWEST_RATE = 1000  # Hz; a lower rate means a wrong header, and resampling to 16 kHz would fill the memory


class Limits(NamedTuple):
    """The largest values that are decoded.

    hours: of a film or sound. film_megapixels: of a film's frame; megapixels: of a picture or mask. channels,
    kilohertz: of a sound; gigasamples: of all its channels together. loudest: a sample, as a multiple of full scale.
    """

    hours: float = 3
    film_megapixels: float = 20
    megapixels: float = 178.95697  # Pillow's limit
    channels: float = 64
    kilohertz: float = 768
    gigasamples: float = 1
    loudest: float = 1e4


@functools.lru_cache
def _read(text: str) -> Limits:
    result = Limits()
    for part in re.split(r"[\s,]+", text.strip()):
        if not part:
            continue
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in Limits._fields or not 0 < number < 1e9:
            raise InputError(
                VARIABLE,
                name,
                f"{part!r:.60} is no limit",
                f"write name=number, of {', '.join(Limits._fields)}, with spaces between them",
            )
        result = result._replace(**{name: number})
    return result


def limits() -> Limits:
    """Return the limits of this process. Raises InputError for a variable that cannot be parsed."""
    return _read(os.environ.get(VARIABLE, ""))


def check(path: str | Path, field: str, **found: float) -> None:
    """Raise InputError for a file that exceeds `limits`; 0 stands for unknown."""
    allowed = limits()
    for name, value in found.items():
        most = getattr(allowed, name)
        if not value <= most:
            what = name.replace("film_", "").replace("loudest", "times full scale in a sample")
            raise InputError(
                str(path),
                field,
                f"has {value:,.4g} {what}, and at most {most:,g} are read",
                f"make it smaller, or raise the limit for one command: {VARIABLE}={name}=NUMBER",
            )


def check_sound(path: str | Path, seconds: float, rate: float, channels: int) -> None:
    """Check the header of a sound against the limits; `seconds` is 0 if unknown."""
    if rate < LOWEST_RATE:
        raise InputError(str(path), "audio", f"has a sample rate of {rate} Hz", "export the audio again")
    check(
        path,
        "audio",
        channels=channels,
        kilohertz=rate / 1e3,
        hours=seconds / 3600,
        gigasamples=seconds * rate * channels / 1e9,
    )
