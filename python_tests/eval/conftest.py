# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the evaluation's tests: the backbone that the compared systems are trained on."""

import pytest
from paper_training import save_backbone

from dualhead_ext.eval.paper.training_run import load_tokenizer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny backbone."""
    return save_backbone(tmp_path_factory.mktemp("eval") / "backbone")


@pytest.fixture(scope="module")
def tokenizer(backbone):
    return load_tokenizer(backbone)
