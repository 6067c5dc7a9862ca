# SPDX-License-Identifier: Apache-2.0
"""Fixture: caches of hidden states that have several files."""

import pytest

from dualhead_ext.train import hidden_cache_build


@pytest.fixture
def small_shards(monkeypatch):
    """Make shards so small that a cache of a few rows has several."""
    monkeypatch.setattr(hidden_cache_build, "SHARD_BYTES", 5000)
