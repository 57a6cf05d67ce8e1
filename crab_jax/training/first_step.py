"""How long a run took from the start of its process to its first step, and what of it was compiled."""

from __future__ import annotations

import time
from typing import Any

import jax
from jax import monitoring

from crab_jax.training.goodput import process_start

# JAX's events for a program that was asked for, and for one that the persistent cache held.
_ASKED, _FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


class FirstStep:
    """Counts programs from its creation to the first step of a run."""

    def __init__(self) -> None:
        self.asked = self.found = 0
        monitoring.register_event_duration_secs_listener(self._ask)
        monitoring.register_event_listener(self._find)

    def _ask(self, event: str, duration_secs: float, **_: Any) -> None:
        self.asked += event == _ASKED

    def _find(self, event: str, **_: Any) -> None:
        self.found += event == _FOUND

    def done(self, step: int, metrics: Any) -> tuple[dict[str, float], str]:
        """Wait for the first step and return (fields of metrics.jsonl, line of the log).

        `first_step_s` is the number of seconds since the process started.
        """
        jax.block_until_ready(metrics)
        monitoring.unregister_event_duration_listener(self._ask)
        monitoring.unregister_event_listener(self._find)
        seconds, compiled = time.time() - process_start(), self.asked - self.found
        line = (
            f"step {step} was done {seconds:.1f} s after the process started ({'cold' if compiled else 'warm'}: "
            f"{compiled} programs compiled, {self.found} from the cache)"
        )
        return {"first_step_s": seconds, "programs_compiled": compiled, "programs_from_cache": self.found}, line
