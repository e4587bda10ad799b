"""Line plots as SVG, for a few curves; log scales on both axes where values span decades."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 190, 48, 52
COLOURS = ("#c0392b", "#1f618d", "#17a589", "#7f8c8d", "#8e44ad", "#d68910")


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    step = 10 ** math.floor(math.log10((high - low) or 1))
    step = next(s for s in (step / 5, step / 2, step, 2 * step, 5 * step) if (high - low) / s <= 8)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Axis:
    def __init__(self, values: Sequence[float], start: float, stop: float):
        self.log = min(values) > 0 and max(values) / min(values) >= 10
        self.low, self.high = min(values), max(values)
        pad = 1.15 if self.log else 0.06 * ((self.high - self.low) or 1)
        self.low, self.high = (self.low / pad, self.high * pad) if self.log else (self.low - pad, self.high + pad)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return _ticks(self.low, self.high, self.log)


def line_plot(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> str:
    """SVG of named lines of (x, y) points, each with its name at its right end."""
    points = [point for line in lines.values() for point in line]
    across = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    up = _Axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in across.ticks():
        parts.append(f'<path d="M{across(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in up.ticks():
        parts.append(f'<path d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    labels: list[float] = []
    for colour, (name, line) in zip(COLOURS, sorted(lines.items(), key=lambda item: up(item[1][-1][1]))):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        parts += [f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" fill="{colour}"/>' for a, b in line]
        at = max([up(line[-1][1]) + 4, *(label + 16 for label in labels[-1:])])
        labels.append(at)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{at:.1f}" style="fill:{colour}">{escape(name)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{LEFT}" y="24" class="title">{escape(title)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#34495e}.title{font-size:14px;font-weight:600}"
        ".grid{stroke:#e5e8eb}polyline{fill:none;stroke-width:2}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<title>{escape(title)}</title><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        + "".join(parts)
        + "</svg>\n"
    )
