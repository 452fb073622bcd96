"""The comparison's plots, as PNG bytes. The only file that needs matplotlib."""

import io

import numpy as np

from encoder.errors import DataError
from eval.comparison import Entry, Pair, Row
from eval.metrics import wilson_interval

METRIC_NAMES = {
    "acc_50": "acc@0.5",
    "acc_75": "acc@0.75",
    "micro": "accuracy",
    "macro": "mean per class",
    "merged_box": "merged box",
    "any_box": "any box",
    "yes_no": "accuracy",
    "two_choice": "accuracy",
    "ferret_rule": "by Ferret's rule",
    "cider": "CIDEr",
    "same_words": "same words",
    "judged": "judge's marks",
    **{f"recall_{k}": f"R@{k}" for k in (1, 5, 10)},
    **{f"top_{k}": f"top-{k}" for k in (1, 5)},
}
# Okabe and Ito's palette, told apart by colour-blind readers; green is kept for the truth.
TRUTH_COLOUR = "#009E73"
RUN_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_DPI = 150
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "legend.frameon": False,
}


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise DataError("matplotlib, which draws the report, is not installed; run pip install 'open-cloc[eval]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update(_STYLE)
    return pyplot


def _png(pyplot, figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()


def _head(axes, title: str, num_runs: int) -> None:
    """Title, and below it the legend, both above the plot."""
    columns = min(2, num_runs)
    axes.set_title(title, fontsize=11, pad=8 + 14 * -(-num_runs // columns))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=9, borderpad=0.2, columnspacing=1.2)


def accuracies(title: str, rows: list[Row], run_names: list[str]) -> bytes:
    """A dot with its 95% interval for every run, a group of dots for every row: one benchmark."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(2.25, 0.9 + 0.2 * len(rows) * (1 + len(run_names))))
    step = 0.7 / len(run_names)
    for place, name in enumerate(run_names):
        found = [(index, row.accuracies[name]) for index, row in enumerate(rows) if name in row.accuracies]
        values = [100 * interval.value for _, interval in found]
        limits = np.array([(100 * interval.low, 100 * interval.high) for _, interval in found]).reshape(-1, 2).T
        axes.errorbar(
            values,
            [index + step * (place - (len(run_names) - 1) / 2) for index, _ in found],
            xerr=np.maximum(np.abs(limits - values), 0),
            fmt="o",
            color=RUN_COLOURS[place % len(RUN_COLOURS)],
            capsize=3,
            label=name,
        )
    axes.set_yticks(range(len(rows)), [f"{row.name.partition('/')[2]}\n{METRIC_NAMES[row.metric]}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("% (95% interval)")
    _head(axes, title, len(run_names))
    return _png(pyplot, figure)


def differences(rows: list[Row], pair: Pair) -> bytes:
    """The paired difference of one pair with its 95% interval, a line for every row, zero marked."""
    pyplot = _pyplot()
    rows = [row for row in rows if pair in row.differences]
    figure, axes = pyplot.subplots(figsize=(3.7, 0.9 + 0.4 * len(rows)))
    for index, row in enumerate(rows):
        interval = row.differences[pair]
        colour = "#777777"
        if interval.excludes_zero:
            colour = RUN_COLOURS[0] if interval.value > 0 else RUN_COLOURS[1]
        low, high = (0.0, 0.0) if np.isnan(interval.low) else (interval.value - interval.low, interval.high - interval.value)
        axes.errorbar(
            100 * interval.value, index, xerr=[[max(0, 100 * low)], [max(0, 100 * high)]], fmt="o", color=colour, capsize=4
        )
    axes.axvline(0, color="#333333", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row.name}\n{METRIC_NAMES[row.metric]}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("percentage points (95% interval)")
    axes.set_title(pair.title)
    return _png(pyplot, figure)


def iou_curve(name: str, entries: dict[str, Entry], run_names: list[str]) -> bytes:
    """Share of answers whose IoU reaches a threshold, over all thresholds: one grounding benchmark and split."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(2.9, 2.5))
    thresholds = np.linspace(0.01, 1, 100)
    for run, entry in entries.items():
        shares = [100 * float((entry.scored.iou >= threshold).mean()) for threshold in thresholds]
        axes.plot(thresholds, shares, color=RUN_COLOURS[run_names.index(run) % len(RUN_COLOURS)], label=run)
    axes.axvline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.set(xlabel="IoU threshold", ylabel="reached, %", xlim=(0, 1), ylim=(0, None))
    _head(axes, name, len(entries))
    return _png(pyplot, figure)


def by_group(title: str, labels: dict[str, list[str]], hits: dict[str, dict[str, np.ndarray]], run_names: list[str]) -> bytes:
    """Bars of accuracy per group, with Wilson's 95% interval, beside each other for the runs.

    labels: group -> lines below its bars; hits: run -> group -> (n,) 0 or 1
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(max(2.9, 0.9 + 0.62 * len(labels)), 2.5))
    width = 0.8 / len(hits)
    for place, (run, groups) in enumerate(hits.items()):
        for index, group in enumerate(labels):
            count, total = int(groups[group].sum()), len(groups[group])
            low, high = wilson_interval(count, total)
            value = count / total
            axes.bar(
                index + width * (place - (len(hits) - 1) / 2),
                100 * value,
                0.92 * width,
                color=RUN_COLOURS[run_names.index(run) % len(RUN_COLOURS)],
                yerr=[[100 * max(0, value - low)], [100 * max(0, high - value)]],
                error_kw={"capsize": 2, "linewidth": 1, "ecolor": "#333333"},
                label=run if index == 0 else None,
            )
    axes.set_xticks(range(len(labels)), ["\n".join(lines) for lines in labels.values()], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="accuracy, %", ylim=(0, min(100, axes.get_ylim()[1])))
    _head(axes, title, len(hits))
    return _png(pyplot, figure)
