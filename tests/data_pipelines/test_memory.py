"""Freed arrays stay with the process."""

import ctypes
import resource

import numpy as np
import pytest

from data_pipelines import allocator


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_an_array_after_another_costs_no_new_pages():
    allocator.keep_freed()
    np.ones(2 << 20)  # 16 MB, 4096 pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(2 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4096
