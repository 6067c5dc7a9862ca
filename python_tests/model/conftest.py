# SPDX-License-Identifier: Apache-2.0
"""Heads in a folder."""

import pytest
from tiny_models import make_model


@pytest.fixture
def saved(tmp_path):
    """A gated model, and the folder of heads that it has saved."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"
