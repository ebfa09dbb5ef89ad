"""A plain bar chart as SVG: groups of bars, each group on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 820
MARGIN = 24
LABELS = 190  # the column of the bars' titles
VALUES = 90  # room behind the longest bar for its value
BAR = 20
STEP = 28
HEAD = 52  # a group's title and subtitle
GAP = 22


class Colours(NamedTuple):
    """The background, the texts, and the two bars of a group."""

    ground: str
    ink: str
    quiet: str
    bars: tuple[str, str]


LIGHT = Colours("#ffffff", "#1f2328", "#59636e", ("#0969da", "#afb8c1"))
DARK = Colours("#0d1117", "#f0f6fc", "#9198a1", ("#4493f8", "#656c76"))


class Bar(NamedTuple):
    """One bar: its length is the median, the whisker goes from the lowest to the highest value."""

    title: str
    median: float
    low: float
    high: float
    text: str


class Group(NamedTuple):
    """Bars that share a scale, the first of them the product's."""

    title: str
    subtitle: str
    bars: tuple[Bar, ...]


def svg(groups: Sequence[Group], caption: str, *, dark: bool) -> str:
    """The chart as a document of its own."""
    colours = DARK if dark else LIGHT
    parts: list[str] = []
    y = MARGIN
    for group in groups:
        parts.append(_text(MARGIN, y + 14, group.title, "ink", weight=600))
        parts.append(_text(MARGIN, y + 34, group.subtitle, "quiet", size=12))
        y += HEAD
        longest = max((bar.high for bar in group.bars), default=0.0) or 1.0
        scale = (WIDTH - 2 * MARGIN - LABELS - VALUES) / longest
        for number, bar in enumerate(group.bars):
            parts += _bar(bar, number, y, scale)
            y += STEP
        y += GAP
    parts.append(_text(MARGIN, y, caption, "quiet", size=12))
    height = y + MARGIN
    rules = "".join(f".bar{number}{{fill:{colour}}}" for number, colour in enumerate(colours.bars))
    style = f".ink{{fill:{colours.ink}}}.quiet{{fill:{colours.quiet}}}{rules}"
    style += f".whisker{{stroke:{colours.ink};stroke-width:1.5}}"
    style += "text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Benchmark of Scopegate">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="{colours.ground}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(bar: Bar, number: int, y: int, scale: float) -> list[str]:
    left, middle = MARGIN + LABELS, y + BAR / 2
    low, high = left + bar.low * scale, left + bar.high * scale
    shapes = [
        _text(left - 10, y + 15, bar.title, "ink", anchor="end"),
        f'<rect class="bar{min(number, 1)}" x="{left}" y="{y}" width="{bar.median * scale:.1f}" '
        f'height="{BAR}" rx="2"/>',
        _text(high + 8, y + 15, bar.text, "ink"),
    ]
    if high - low >= 1:
        shapes.append(
            f'<path class="whisker" fill="none" d="M{low:.1f} {middle - 4}v8m0-4H{high:.1f}m0-4v8"/>'
        )
    return shapes


def _text(
    x: float, y: float, text: str, kind: str, *, size: int = 14, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
