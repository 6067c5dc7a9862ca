# SPDX-License-Identifier: Apache-2.0
"""Fixture: heads saved in a folder."""

import pytest
from tiny_models import make_model


@pytest.fixture
def saved(tmp_path):
    """A gated model, and the folder in which its heads are saved."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"
