"""Clean stops: SIGTERM, or Ctrl-C once, ends a run after a step that all its processes agree on."""

from __future__ import annotations

import os
import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns SIGTERM and the first SIGINT into a request to stop; a second SIGINT ends the process as usual.

    With several processes, one signal to one of them is enough: JAX's preemption service, which handles SIGTERM,
    spreads it and determines the first step that no process has passed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: types.FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`: the same answer on every process. Call it after each step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.asked
