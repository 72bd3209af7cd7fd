"""Shared fixtures; hypothesis runs the same bounded examples every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import batchnorm as bn
import cases

settings.register_profile(
    "same-every-time",
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same-every-time")


@pytest.fixture
def rng():
    return np.random.default_rng(1502_03167)


@pytest.fixture(params=cases.DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=cases.LAYOUTS, ids=str)
def layout(request):
    return request.param


@pytest.fixture
def restore_execution():
    """Puts threads, their source and the level back after a test that changes them."""
    threads, source, level = bn.get_num_threads(), bn.get_thread_source(), bn.simd_level()
    yield
    bn.set_num_threads(threads)
    bn.set_thread_source(source)
    bn.set_simd_level(level)
