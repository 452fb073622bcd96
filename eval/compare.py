"""Sets runs side by side: a table with paired 95% intervals, and report.html with plots and pictures.

    python eval/compare.py runs/eval_cloc runs/eval_clip --out runs/report
    python eval/compare.py cloc=A clip=B cloc_before=C clip_before=D --pairs cloc:clip cloc:cloc_before --out runs/report

The paper's Tables 4 and 5 are laid out with the published rows above one's own, where a run has a column of them. A run is
the --out folder of the evaluations, with all benchmarks and splits it holds. Runs that were asked in another
way, or other questions, are refused. Where a run tried several ways to read a box, its best one is compared.
"""

import argparse
import json
from dataclasses import asdict
from math import isnan
from pathlib import Path

from encoder.errors import run_main
from eval.comparison import (
    Pair,
    Row,
    Run,
    choose_pairs,
    compare,
    load_runs,
    refuse_different_protocol,
    unshared,
    variants_compared,
)
from eval.paper_tables import as_latex, as_markdown, paper_tables, tex
from eval.predictions import write_whole
from eval.report_page import p_value, page, percent, signed, verdict
from eval.report_plots import METRIC_NAMES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="run folders, two or more")
    parser.add_argument("--pairs", nargs="+", metavar="A:B", help="differences to show, A minus B; default: first minus each")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report, such as what was trained now")
    parser.add_argument("--examples", type=int, default=6, help="pictures per group of the report (default: %(default)s)")
    parser.add_argument("--images", type=Path, help="folder of the pictures, if not where the evaluations found them")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html, report.md, report.tex and report.json")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    runs = load_runs(args.runs)
    pairs = choose_pairs(runs, args.pairs)
    refuse_different_protocol(runs)
    rows = compare(runs, pairs, args.seed)
    warnings = [*unshared(runs), *incomplete(runs)]

    for pair in pairs:
        print("\n".join([*terminal_table(rows, pair), *variants_compared(runs, pair), verdict(rows, pair)]), end="\n\n")
    for sentence in warnings:
        print(f"note: {sentence}")

    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "report.json", json.dumps(as_json(runs, rows, args), indent=1) + "\n")
    report = page(runs, pairs, rows, args.note, warnings, args.examples, args.images)
    write_whole(args.out / "report.html", report)
    tables = paper_tables(runs)
    text = [*map(as_markdown, tables), *(markdown_differences(rows, pair) for pair in pairs)]
    write_whole(args.out / "report.md", "\n".join(text))
    write_whole(args.out / "report.tex", "\n".join([*map(as_latex, tables), *(latex_differences(rows, pair) for pair in pairs)]))
    print(f"report: {args.out / 'report.html'}")


def terminal_table(rows: list[Row], pair: Pair) -> list[str]:
    """The pair as lines of text; a star marks an interval without zero."""
    rows = [row for row in rows if pair in row.differences]
    label = max(17, *(len(row.name) for row in rows))
    a, b = max(6, len(pair.first)), max(6, len(pair.second))
    widths = f"{{:<{label}}}  {{:<14}}  {{:>{a}}}  {{:>{b}}}  {{:<{max(24, len(pair.title) + 6)}}}  {{:>6}}  {{:>6}}"
    lines = [widths.format("benchmark / split", "metric", pair.first, pair.second, f"{pair.title} [95%]", "chance", "n")]
    lines.append("-" * len(lines[0]))
    for row in rows:
        difference = row.differences[pair]
        first, second = (percent(row.accuracies[name].value) for name in (pair.first, pair.second))
        text = signed(difference) + (" *" if difference.excludes_zero else "")
        lines.append(widths.format(row.name, METRIC_NAMES[row.metric], first, second, text, percent(row.chance), row.n))
    return lines


def difference_cells(row: Row, pair: Pair) -> list[str]:
    """A row of a pair's table: name, metric, both accuracies, difference, signs, n."""
    first, second = (percent(row.accuracies[name].value) for name in (pair.first, pair.second))
    signs = row.signs[pair]
    return [
        row.name,
        METRIC_NAMES[row.metric],
        first,
        second,
        signed(row.differences[pair]),
        f"{signs.better} : {signs.worse}",
        p_value(signs.p),
        f"{row.n}",
    ]


def difference_titles(pair: Pair) -> list[str]:
    return ["benchmark / split", "metric", pair.first, pair.second, f"{pair.title} [95%]", "pictures better : worse", "p", "n"]


def markdown_differences(rows: list[Row], pair: Pair) -> str:
    titles = difference_titles(pair)
    lines = [f"## {pair.title}", "", "| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    lines += ["| " + " | ".join(difference_cells(row, pair)) + " |" for row in rows if pair in row.differences]
    return "\n".join([*lines, ""])


def latex_differences(rows: list[Row], pair: Pair) -> str:
    titles = difference_titles(pair)
    lines = [f"% {tex(pair.title)}", rf"\begin{{tabular}}{{ll{'r' * (len(titles) - 2)}}}", r"\toprule"]
    lines += [" & ".join(map(tex, titles)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(tex, difference_cells(row, pair))) + r" \\" for row in rows if pair in row.differences]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def incomplete(runs: list[Run]) -> list[str]:
    """A sentence per benchmark that was not evaluated whole."""
    partial = {}
    for run in runs:
        for name, variants in run.entries.items():
            text = str(variants[0].evaluation.protocol.get("completeness", ""))
            if text.startswith("PARTIAL"):
                partial[name] = f"{name} is {text}"
    return list(partial.values())


def as_json(runs: list[Run], rows: list[Row], args: argparse.Namespace) -> dict:
    """What report.json holds: every number of the tables as fractions, and each run's weights."""
    return {
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "weights": {name: v[0].evaluation.run["model"].get("weights_sha256") for name, v in run.entries.items()},
            }
            for run in runs
        },
        "notes": args.note,
        "bootstrap_seed": args.seed,
        "rows": [
            {
                "name": row.name,
                "metric": row.metric,
                "n": row.n,
                "chance": None if isnan(row.chance) else row.chance,
                "accuracies": {name: asdict(interval) for name, interval in row.accuracies.items()},
                "differences": [
                    {"first": pair.first, "second": pair.second, **asdict(interval), "signs": asdict(row.signs[pair])}
                    for pair, interval in row.differences.items()
                ],
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    run_main(main)
