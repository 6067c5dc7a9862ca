# SPDX-License-Identifier: Apache-2.0
"""Whether a plot can be read: no text overlaps another or leaves the page."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def drawn_texts(figure) -> list[tuple[str, object]]:
    """Each visible text with its box in pixels. matplotlib also keeps ticks outside of an axis."""
    FigureCanvasAgg(figure).draw()
    hidden = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text().strip()]
    return [(text, box) for text, box in boxes if box.width and box.height]


def check_legible(figure) -> None:
    boxes = drawn_texts(figure)
    assert len(boxes) > 5
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, text
        assert "10^" not in text and "times" not in text, text  # no labels such as 3 x 10^0
    for i, (text, box) in enumerate(boxes):
        for other, its in boxes[i + 1 :]:
            assert not box.padded(-1).overlaps(its.padded(-1)), (text, other)
