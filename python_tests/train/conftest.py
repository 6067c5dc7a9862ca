# SPDX-License-Identifier: Apache-2.0
"""Caches of hidden states in several files."""

import pytest

from dualhead_ext.train import hidden_cache_build


@pytest.fixture
def small_shards(monkeypatch):
    """A cache of a few rows has several shards."""
    monkeypatch.setattr(hidden_cache_build, "SHARD_BYTES", 5000)
