"""The 71 classes of AVSBench-semantic: their names and the colours of their masks."""

from __future__ import annotations

import functools

import numpy as np

CLASSES = tuple(
    """
    background accordion airplane axe baby bassoon bell bird boat boy bus car cat cello clarinet clipper clock dog
    donkey drum duck elephant emergency-car erhu flute frying-food girl goose guitar gun guzheng hair-dryer handpan
    harmonica harp helicopter hen horse keyboard leopard lion man marimba missile-rocket motorcycle mower parrot
    piano pig pipa saw saxophone sheep sitar sorna squirrel tabla tank tiger tractor train trombone truck trumpet
    tuba ukulele utv vacuum-cleaner violin wolf woman
""".split()
)  # AVSBench-semantic class ids 0..70 (label2idx.json less one)


@functools.cache
def avss_palette() -> np.ndarray:
    """Return uint8[71, 3], the RGB colour of each class: the bits of the class id, spread over the channels."""
    palette = np.zeros((len(CLASSES), 3), np.uint8)
    for label in range(len(CLASSES)):
        for bit in range(3):
            for channel in range(3):
                palette[label, channel] |= (label >> (3 * bit + channel) & 1) << (7 - bit)
    palette.setflags(write=False)
    return palette
