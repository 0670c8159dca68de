"""Draw benchmark results: throughput against the number of sequences, or latency against load.

    python scripts/bench_peers.py ... | tee peers.txt
    python scripts/plot_bench.py peers.txt --output peers.png
    python scripts/plot_bench.py serving.txt --output serving.png

A results file is what bench_peers.py, bench_offline.py or bench_serving.py printed: its last line is one JSON
object, which says what to draw. Several files of one kind share a picture, a series each; label them with
NAME=FILE. Needs matplotlib: pip install "jaxserve[bench]". Points are medians; the figures are not altered.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_workload import median

OURS_COLORS = ("#c1121f", "#f77f00", "#7b2cbf")
OTHER_COLORS = ("#1d3557", "#457b9d", "#2a9d8f", "#6c757d", "#8d99ae")
LATENCIES = {"ttft_ms": "time to first token, ms", "itl_ms": "between tokens, ms"}
GOODPUT = ("goodput", "goodput, 1/s (dotted: all of the load)")
LABEL_POINTS = 11.0  # between two labels, at least
Point = tuple[float, float]
Series = dict[str, list[Point]]


def read_report(path: Path) -> dict[str, Any]:
    """The JSON object on a file's last line. Raises ValueError if there is none."""
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise ValueError(f"the last line of {path} is not one JSON object.")
    return report


def kind_of(report: dict[str, Any]) -> str:
    """ "throughput" or "latency"."""
    if "workers" in report or "precisions" in report:
        return "throughput"
    if "levels" in report:
        return "latency"
    raise ValueError("neither bench_peers.py, bench_offline.py nor bench_serving.py writes such an object.")


def check_kinds(reports: Sequence[dict[str, Any]]) -> str:
    """The kind of all of them."""
    kinds = {kind_of(report) for report in reports}
    if len(kinds) > 1:
        raise ValueError("results of throughput and of latency do not share a picture; draw them apart.")
    return kinds.pop()


def list_runs(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of random prompts, by who ran them."""
    if "workers" in report:
        return report["runs"]
    return {f"jaxserve {name}": results.get("runs", []) for name, results in report["precisions"].items()}


def read_throughput(report: dict[str, Any], num_prompt_tokens: int, figure: str) -> Series:
    """By name: the median of a figure for each number of sequences; what was not measured is left out."""
    series: Series = {}
    for name, runs in list_runs(report).items():
        found = [run for run in runs if run.get("num_prompt_tokens") == num_prompt_tokens]
        points = []
        for count in sorted({run["num_sequences"] for run in found}):
            value = median(run[figure] for run in found if run["num_sequences"] == count)
            if value is not None:
                points.append((float(count), value))
        if points:
            series[name] = points
    return series


def read_latency(report: dict[str, Any], name: str, percentile: str) -> list[Point]:
    """A percentile of a figure against the request rate, in order of rate; "" of one without percentiles."""
    points = []
    open_loop = [level for level in report["levels"] if level["request_rate"] is not None]
    for level in sorted(open_loop, key=lambda level: level["request_rate"]):
        value = level.get(name)
        value = value.get(percentile) if percentile and value else value
        if value is not None:
            points.append((level["request_rate"], value))
    return points


def list_prompt_lengths(reports: Iterable[dict[str, Any]]) -> list[int]:
    return sorted(
        {
            run["num_prompt_tokens"]
            for report in reports
            for runs in list_runs(report).values()
            for run in runs
            if "num_prompt_tokens" in run
        }
    )


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Places moved as little as need be, from the lowest up, until no two are closer than `distance`.

    Pairs that are too close are moved apart around their middle, as groups.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[tuple[float, list[int]]] = []  # middle, members from the lowest
    for index in order:
        groups.append((places[index], [index]))
        while len(groups) > 1:
            (below, lower), (above, upper) = groups[-2], groups[-1]
            if above - below >= distance * (len(lower) + len(upper)) / 2:
                break
            members = lower + upper
            groups[-2:] = [(sum(places[member] for member in members) / len(members), members)]
    moved = list(places)
    for middle, members in groups:
        for rank, member in enumerate(members):
            moved[member] = middle + distance * (rank - (len(members) - 1) / 2)
    return moved


def choose_colors(names: Sequence[str]) -> dict[str, str]:
    """Ours stand out; the others keep to cool colours."""
    ours = [name for name in names if name.startswith("jaxserve")]
    others = [name for name in names if not name.startswith("jaxserve")]
    colors = {name: OURS_COLORS[index % len(OURS_COLORS)] for index, name in enumerate(ours)}
    return colors | {name: OTHER_COLORS[index % len(OTHER_COLORS)] for index, name in enumerate(others)}


def draw_series(axes: Any, series: Series, colors: dict[str, str]) -> None:
    """A line for each; ours are thick, a 99th percentile is dashed."""
    for name, points in series.items():
        width = 2.4 if name.startswith("jaxserve") else 1.4
        dashes = "--" if name.endswith("p99") else "-"
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, dashes, marker="o", color=colors[name], linewidth=width, markersize=4)


def label_ends(axes: Any, series: Series, colors: dict[str, str]) -> None:
    """Call it when the axes' limits are final: labels are spread in points on the picture."""
    if not series:
        return
    to_pixels = axes.transData.transform
    points_per_pixel = 72 / axes.figure.dpi
    ends = {name: points[-1] for name, points in series.items()}
    heights = [to_pixels(end)[1] * points_per_pixel for end in ends.values()]
    for (name, end), height, place in zip(ends.items(), heights, spread(heights, LABEL_POINTS), strict=True):
        axes.annotate(
            f"{name}  {end[1]:.3g}" if end[1] < 100 else f"{name}  {end[1]:.0f}",
            end,
            xytext=(8, place - height),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colors[name],
            fontweight="bold" if name.startswith("jaxserve") else "normal",
            annotation_clip=False,
        )


def draw_throughput(pyplot: Any, reports: dict[str, dict[str, Any]]) -> Any:
    """A row of panels for each prompt length: decode and prefill against sequences."""
    lengths = list_prompt_lengths(reports.values())
    panels = (("decode_tps", "decode, new tokens/s"), ("prefill_tps", "prefill, prompt tokens/s"))
    figure, grid = pyplot.subplots(
        len(lengths), 2, figsize=(13, 4.6 * len(lengths) + 0.6), squeeze=False, layout="constrained"
    )
    drawn = []
    for row, length in zip(grid, lengths, strict=True):
        for axes, (name, label) in zip(row, panels, strict=True):
            series = merge(
                {title: read_throughput(report, length, name) for title, report in reports.items()}
            )
            colors = choose_colors(list(series))
            draw_series(axes, series, colors)
            counts = sorted({point[0] for points in series.values() for point in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [f"{count:.0f}" for count in counts])
            axes.set_ylim(0, 1.08 * max(point[1] for points in series.values() for point in points))
            axes.set_xlabel("sequences at once")
            axes.set_ylabel(label)
            axes.set_title(f"prompts of {length} tokens", fontsize=10, loc="left")
            axes.grid(alpha=0.25)
            # Room for the labels, inside the axes, so that they move with them.
            axes.set_xlim(counts[0] / 1.15, counts[-1] * max(2.0, (counts[-1] / counts[0]) ** 0.6))
            drawn.append((axes, series, colors))
    return figure, drawn


def draw_latency(pyplot: Any, reports: dict[str, dict[str, Any]]) -> Any:
    """Latencies and goodput against the request rate; p50 whole, p99 dashed."""
    if len(reports) == 1:
        reports = {"jaxserve": next(iter(reports.values()))}
    shades = choose_colors(list(reports))
    panels = []
    for name, label in [*LATENCIES.items(), GOODPUT]:
        percentiles = ("p50", "p99") if name in LATENCIES else ("",)
        series: Series = {}
        colors = {}
        for title, report in reports.items():
            for percentile in percentiles:
                key = f"{title} {percentile}".strip()
                points = read_latency(report, name, percentile)
                if points:
                    series[key], colors[key] = points, shades[title]
        if series:
            panels.append((name, label, series, colors))
    if not panels:
        raise ValueError("there is nothing to draw: no level has a request rate.")
    figure, [row] = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    drawn = []
    for axes, (name, label, series, colors) in zip(row, panels, strict=True):
        draw_series(axes, series, colors)
        if name in LATENCIES:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(pyplot.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(pyplot.NullFormatter())
        else:
            rates = [point[0] for points in series.values() for point in points]
            axes.plot([0, max(rates)], [0, max(rates)], ":", color="#8d99ae", linewidth=1)  # all in time
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.set_xlabel("request rate offered, 1/s")
        axes.grid(alpha=0.25, which="both")
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, 0), right + 0.45 * (right - left))
        drawn.append((axes, series, colors))
    return figure, drawn


def merge(series_by_title: dict[str, Series]) -> Series:
    """One Series of all files; names carry the file's title where there are several."""
    merged: Series = {}
    for title, series in series_by_title.items():
        for name, points in series.items():
            merged[f"{name} ({title})" if len(series_by_title) > 1 else name] = points
    return merged


def describe(report: dict[str, Any]) -> str:
    """Machine, versions and commit, for the title; of results without them, what was asked for."""
    if "machine" not in report:
        settings = report.get("settings", {})
        asked = [f"{name} {settings[name]}" for name in ("model", "workload") if settings.get(name)]
        return ", ".join(asked)
    machine = report["machine"]
    words = [machine.get("cpu") or machine.get("device", ""), f"{machine.get('cores', '?')} cores"]
    words += [f"{name} {machine[name]}" for name in ("jax", "python") if name in machine]
    for name, worker in report.get("workers", {}).items():
        version = worker["ready"].get("version")
        if version and not any(name.split()[0] in word for word in words):
            words.append(f"{name.split()[0]} {version}")
    words += [f"commit {machine['commit']}"] if machine.get("commit") else []
    words += [machine["date"]] if machine.get("date") else []
    return "\n".join(textwrap.wrap(f"{Path(str(report.get('model', ''))).name}: {', '.join(words)}", 130))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="[NAME=]FILE")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--title", default="", help="for results that do not know their machine")
    arguments = parser.parse_args()
    reports = {}
    for word in arguments.results:
        name, equals, path = word.rpartition("=")
        reports[name if equals else Path(path).stem] = read_report(Path(path))
    draw(reports, arguments.output, arguments.title)


def draw(reports: dict[str, dict[str, Any]], output: Path, title: str = "") -> None:
    """Write the picture of reports of one kind, by name."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    kind = check_kinds(list(reports.values()))
    draw_kind = draw_throughput if kind == "throughput" else draw_latency
    figure, drawn = draw_kind(pyplot, reports)
    figure.suptitle(title or describe(next(iter(reports.values()))), fontsize=10)
    figure.canvas.draw()  # fixes the layout, and so the places of labels
    for axes, series, colors in drawn:
        label_ends(axes, series, colors)
    figure.savefig(output, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
