"""Shared by the tests: one generator for their arrays, and how hypothesis works here."""

import os

import hypothesis
import numpy as np
import pytest

# The same examples on every run of CI, others on every run elsewhere; nothing is left in the working directory.
hypothesis.settings.register_profile("qkv", database=None, deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("qkv")


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)
