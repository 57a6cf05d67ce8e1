"""Results on disk: results.json of an evaluation and metrics.jsonl of a run, checked as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crab_jax.io.bounds import Choice, Number, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.structured import Each, check, read_json
from crab_jax.tasks import TASKS

METRICS = Each(Text(1, 200), Number())  # schema of a line of metrics.jsonl
SCORES = {
    "n": Whole(),
    "n_unparsed?": Whole(),
    "n_no_mask?": Whole(),
    "intervals?": Each(Text(1, 200), (Number(), Number())),
}


def read_results(path: Path) -> dict[str, Any]:
    """Return the results.json that evaluate wrote.

    Raises InputError for a file that is missing or malformed, and for a metric that is not a number.
    """
    fix = "give the results.json of evaluate"
    if not path.is_file():
        raise InputError(str(path), "--results", "no such file", fix)
    scores = Each(Choice(tuple(TASKS)), SCORES)
    results: dict[str, Any] = read_json(
        path, {"tasks": scores, "baselines?": Each(Text(1, 100), scores)}, "--results", fix
    )
    for at, tasks in (("tasks", results["tasks"]), *results.get("baselines", {}).items()):
        for name, row in tasks.items():
            check(
                {key: value for key, value in row.items() if key != "intervals"},
                Each(Text(), Number()),
                str(path),
                f"{at}.{name}",
            )
    return results
