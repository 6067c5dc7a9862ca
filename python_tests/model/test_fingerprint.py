# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a backbone, for parameters as large as real ones."""

import pytest
import torch
from tiny_models import make_backbone, make_model

from dualhead_ext.model.fingerprint import VALUES, _few_values, check_fingerprint, fingerprint
from dualhead_ext.train.state import _rows_hash

# (rows, columns) of the heads of Llama 2, Llama 3 and Qwen 3, and a size that float32 cannot count.
LARGE = [(32_000, 4096), (128_256, 4096), (151_936, 2048), (2**24 + 2, 3)]


@pytest.mark.parametrize("shape", LARGE)
def test_parameters_beyond_what_float32_counts(shape):
    """One row or column is expanded to a whole parameter, which takes no memory."""
    rows, columns = shape
    column = torch.arange(rows, dtype=torch.float32)[:, None].expand(shape)
    row = torch.arange(columns, dtype=torch.float32).expand(shape)
    last = rows * columns - 1
    indices = [0, last // 3, 2 * last // 3, last]
    for values, expected in (
        (column, [i // columns for i in indices]),
        (row, [i % columns for i in indices]),
    ):
        assert _few_values(values) == torch.tensor(expected, dtype=torch.float32).tolist()


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (5, 7, 3)])
def test_the_first_and_the_last_value_are_among_them(shape):
    values = torch.randn(shape)
    few = _few_values(values)
    assert len(few) == VALUES
    assert few[0] == values.flatten()[0] and few[-1] == values.flatten()[-1]


def test_version_1_chose_by_float32():
    """For some sizes, version 1 chose other indices. A file of version 1 must still match its
    values.
    """
    differing = 0
    for count in (4, 101, 4096 * 7, 9_429_140, 2**24):
        values = torch.arange(count, dtype=torch.float64)
        old = torch.linspace(0, count - 1, VALUES).long()
        assert _few_values(values.double(), version=1) == values[old].float().tolist()
        differing += _few_values(values) != values[old].float().tolist()
    assert differing


def test_offloaded_weights_are_not_compared():
    model = make_model("llama")
    stored = fingerprint(model)
    assert len(stored["parameters"]) > 5
    for parameter in make_backbone("llama").parameters():
        assert all(map(lambda x: x == x, _few_values(parameter)))
    check_fingerprint(make_backbone("llama"), stored, "here")
    # On meta, as offloaded weights are
    check_fingerprint(make_backbone("llama").to("meta"), stored, "here")


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return {"row": index}


def test_rows_beyond_what_float32_counts():
    assert _rows_hash(Rows(2**24 + 3)) != _rows_hash(Rows(2**24 + 4))
    assert _rows_hash(Rows(1)) != _rows_hash(Rows(2))
