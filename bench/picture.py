"""Writes docs/memory.svg: bytes live at each call of video_unet/small, as captured and after slice-groups, as predicted.

python bench/picture.py [--size tiny|small] [--output FILE]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import graphwright as gw
from graphwright.ir.liveness import profile

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 800, 320, 60, 40, 40
MIB = 2**20


def area(live: Sequence[int], top: float, color: str) -> str:
    """The curve as a filled step polygon, over the whole width whatever its number of calls."""
    step, floor = (WIDTH - LEFT) / len(live), HEIGHT - BOTTOM
    points = [f"{LEFT},{floor}"]
    for i, value in enumerate(live):
        y = floor - (floor - TOP) * value / top
        points += [f"{LEFT + i * step:.1f},{y:.1f}", f"{LEFT + (i + 1) * step:.1f},{y:.1f}"]
    return f'<polygon points="{" ".join([*points, f"{WIDTH},{floor}"])}" fill="{color}"/>'


def picture(name: str, before: Sequence[int], after: Sequence[int]) -> str:
    """Both curves on one scale, as SVG."""
    top, floor = max(before), HEIGHT - BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        area(before, top, "#9aa3af"),
        area(after, top, "#2563eb"),
        f'<text x="{LEFT}" y="20">{name}, bytes live at each call. Grey: as captured, {max(before) / MIB:.1f} MiB. '
        f'<tspan fill="#2563eb">Blue: slice-groups, {max(after) / MIB:.1f} MiB.</tspan></text>',
        f'<text x="{LEFT}" y="{HEIGHT - 14}">calls, first to last ({len(before)} as captured, {len(after)} after)</text>',
    ]
    for part in (0, 0.25, 0.5, 0.75, 1):
        y = floor - (floor - TOP) * part
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * part / MIB:.0f}</text>')
    lines.append(f'<text x="6" y="{TOP - 8}">MiB</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "memory.svg")
    options = parser.parse_args()
    module, args, kwargs = gw.models.load("video_unet", options.size)
    passes = [gw.SliceGroups(memory_budget="25%")]
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten")
    curves = [[int(n) for n in profile(program.main).live] for program in (compiled.history[0], compiled.program)]
    options.output.write_text(picture(f"video_unet/{options.size}", *curves), encoding="utf-8")


if __name__ == "__main__":
    main()
