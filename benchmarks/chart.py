"""A bar chart of speed-ups over eager, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.engines import AUTO, ENGINES
from benchmarks.judge import medians_ms

# Colours that also those see apart who do not see red and green (Okabe and Ito, 2008).
_PALETTE = (
    "#999999",
    "#56b4e9",
    "#0072b2",
    "#cc79a7",
    "#000000",
    "#f0e442",
    "#009e73",
    "#e69f00",
    "#882255",
    "#332288",
)
_SHOWN = [engine for engine in ENGINES if engine not in ("eager", "mpsrun serial", AUTO)]
COLOURS = dict(zip(_SHOWN, _PALETTE, strict=False)) | {AUTO: "#d55e00"}
BAR_PX, GAP_PX, LEFT_PX, WIDTH_PX, TOP_PX = 9, 12, 130, 760, 52
LEGEND_COLUMNS = 5


def svg(rows: Sequence[dict[str, Any]]) -> str:
    """One group of bars for each row, one bar for each engine; a line marks eager."""
    bars = [(f"{row['network']} {row['batch']}", speed_ups(row)) for row in rows]
    longest = max((ratio for _, ratios in bars for ratio in ratios.values()), default=1.0)
    scale = (WIDTH_PX - LEFT_PX - 50) / max(longest, 1.0)
    parts, y = [*_legend()], TOP_PX
    for name, ratios in bars:
        middle = y + max(len(ratios), 1) * BAR_PX / 2 + 4
        parts.append(_text(LEFT_PX - 8, middle, name, anchor="end"))
        for engine, ratio in ratios.items():
            parts.append(_bar(LEFT_PX, y, ratio * scale, COLOURS[engine]))
            parts.append(_text(LEFT_PX + ratio * scale + 4, y + BAR_PX - 1, f"{ratio:.2f}x", size=8))
            y += BAR_PX
        y += GAP_PX + (0 if ratios else BAR_PX)
    one = LEFT_PX + scale
    parts.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{TOP_PX - 6}" y2="{y}" stroke="#000" stroke-dasharray="3"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{y}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def speed_ups(row: dict[str, Any]) -> dict[str, float]:
    """By engine, how often it steps while eager steps once."""
    times = medians_ms(row)
    if "eager" not in times:
        return {}
    return {engine: times["eager"] / times[engine] for engine in COLOURS if engine in times}


def _legend() -> list[str]:
    step = (WIDTH_PX - 20) / LEGEND_COLUMNS
    parts = []
    for i, (engine, colour) in enumerate(COLOURS.items()):
        row, column = divmod(i, LEGEND_COLUMNS)
        x, y = 10 + column * step, 8 + row * 18
        parts += [_bar(x, y, 10, colour), _text(x + 14, y + 9, engine)]
    return parts


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR_PX - 1}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
