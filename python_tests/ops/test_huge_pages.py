# SPDX-License-Identifier: Apache-2.0
"""Weights of the CPU in huge pages: what is moved, and what is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dualhead_ext import DualHead
from dualhead_ext.ops import huge_pages
from dualhead_ext.ops.huge_pages import HUGE_PAGE, use_huge_pages

ELEMENTS = 6 * HUGE_PAGE // 4


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.delenv("DUALHEAD_HUGE_PAGES", raising=False)
    huge_pages._collapse.cache_clear()
    if not huge_pages.allowed():
        pytest.skip("this system has no huge pages")


def bytes_in_huge_pages(address: int) -> int:
    """AnonHugePages of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, last = (int(part, 16) for part in words[0].split("-"))
            inside = first <= address < last
        elif inside and words[0] == "AnonHugePages:":
            return 1024 * int(words[1])
    raise LookupError(hex(address))


def test_large_weights_are_moved_and_keep_values_and_addresses():
    weight = torch.randn(ELEMENTS)
    view, before, address = weight[3:], weight.clone(), weight.data_ptr()
    moved = use_huge_pages([weight, None])
    if not moved:
        pytest.skip("Linux found no huge pages free")
    assert 5 * HUGE_PAGE <= moved <= 6 * HUGE_PAGE
    assert bytes_in_huge_pages(address + HUGE_PAGE) >= moved
    assert weight.data_ptr() == address and view.data_ptr() == address + 12
    assert torch.equal(weight, before)
    assert use_huge_pages([weight]) == moved  # from the cache


def test_what_is_left_as_it_is(tmp_path, monkeypatch):
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=ELEMENTS)
    with FakeTensorMode():
        fake = torch.empty(ELEMENTS)
    small, strided = torch.randn(100), torch.randn(2 * ELEMENTS)[::2]
    meta = torch.empty(ELEMENTS, device="meta")
    assert use_huge_pages([mapped, fake, small, strided, meta]) == 0
    monkeypatch.setattr(huge_pages, "_collapse", lambda start, size: pytest.fail("was called"))
    assert use_huge_pages([fake, small, strided, meta]) == 0
    monkeypatch.setenv("DUALHEAD_HUGE_PAGES", "0")
    assert use_huge_pages([torch.randn(ELEMENTS)]) == 0


def test_a_system_that_forbids_them(tmp_path, monkeypatch):
    setting = tmp_path / "enabled"
    for text, expected in (("always madvise [never]", False), ("always [madvise] never", True)):
        setting.write_text(text)
        monkeypatch.setattr(huge_pages, "_SETTING", setting)
        assert huge_pages.allowed() == expected
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "missing")
    assert not huge_pages.allowed()


def test_decoding_moves_the_heads(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_collapse", lambda *place: asked.append(place) or 0)
    lm_head = torch.nn.Linear(1024, 4096, bias=False)
    head = DualHead.from_lm_head(lm_head, reward_head="full", gate="fixed")
    head.new_cache(1, 8)
    rewards = head.reward_head.weight
    assert {(w.data_ptr(), w.nbytes) for w in (lm_head.weight, rewards)} == set(asked)
