"""Shared test settings: CPU unless the caller says otherwise, full float32 products, and the golden directory."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: a third of the time by optimising less, by the older way to emit loops, and by
# leaving each program in one piece. Commands that tests start inherit it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax  # noqa: E402  (the platform must be chosen first)

from crab_jax.aot import compile_cache  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")
compile_cache.enable()  # one folder for all workers and the commands they start


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that none of them is left to run alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Free the programs of a file after its tests: those of all files together take gigabytes of a worker."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """A bucket on a server of this machine, once of each kind."""
    from tests.servers import serving

    with serving(request.param, tmp_path_factory.mktemp("objects")) as started:
        yield started


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of golden arrays and weights; `CRAB_GOLDEN_DIR` points at another one of the same layout."""
    return Path(os.environ.get("CRAB_GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory) -> Path:
    """A data root of a few generated scenes: 8 to train on, 3 to test on."""
    from data_pipelines.sources import scenes

    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, {"train": 8, "val": 1, "test": 3}, seed=7)
    return root
