"""The index of Examples: the same Examples and orders as the annotations, never of other ones, and small."""

import json
import shutil

import orders
import pytest
import releases

from crab_jax.runs import run_data
from data_pipelines import index
from data_pipelines.examples import write_jsonl
from data_pipelines.index import Indexed

GOLDEN = json.loads(orders.FILE.read_text())


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The roots of orders.py, without an index and with one."""
    folder = tmp_path_factory.mktemp("roots")
    releases.write(folder / "plain" / "releases", folder / "scenes")
    write_jsonl(folder / "plain" / "list" / "train.jsonl", orders.listed())
    for name in ("releases", "list"):
        shutil.copytree(folder / "plain" / name, folder / "indexed" / name)
        index.write_all(folder / "indexed" / name)
    return folder


@pytest.mark.parametrize("case", orders.CASES)
def test_the_order_is_that_of_the_time_before_the_index_with_and_without_one(roots, case):
    root, changes = orders.CASES[case]
    for kind in ("plain", "indexed"):
        config = orders.config_of(roots / kind / root, changes)
        is_indexed = isinstance(run_data.train_examples(config), Indexed)
        assert is_indexed == (kind == "indexed" and case != "two splits")
        assert orders.record(config) == GOLDEN[case]
