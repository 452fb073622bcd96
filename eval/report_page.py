"""The comparison as one self-contained HTML page: tables, plots and pictures inside, nothing fetched."""

import base64
from html import escape
from pathlib import Path

import numpy as np

from eval import report_plots
from eval.comparison import GRADED, Entry, Example, Pair, Row, Run, examples, variants_compared
from eval.metrics import SIZE_EDGES, Interval, size_name
from eval.paper_tables import as_html, paper_tables
from eval.report_pictures import draw_example, image_folder
from eval.report_plots import METRIC_NAMES, RUN_COLOURS, TRUTH_COLOUR
from eval.scoring import HEADLINES

SMALLEST_GROUP = 20
JUDGED = {metrics[0] for metrics in HEADLINES.values()}
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem; max-width: 62rem }
h1 { font-size: 1.6rem; margin: .2rem 0 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem } p { margin: .4rem 0 } .quiet { color: #666; font-size: .9rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; margin: .5rem 0 }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { border-bottom: 2px solid #bbb; white-space: normal } th:first-child, td:first-child, td.text, th.text { text-align: left }
td small { display: block; color: #666; font-weight: 400 }
td:first-child { white-space: normal; min-width: 8rem }
@media (max-width: 32rem) { th, td { padding: .3rem .3rem } }
table.small { font-size: .82rem } table.small small { white-space: normal }
table.paper th, table.paper td { padding: .3rem .45rem } th.group { text-align: center; border-bottom: 1px solid #bbb }
tr.own td { font-weight: 600 }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; text-align: left }
td.ahead { color: #0a6b2c; font-weight: 600 } td.behind { color: #a3261b; font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start } .plots img { max-width: 100%; height: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: .8rem }
.card { border: 1px solid #ddd; border-radius: 6px; overflow: hidden; font-size: .9rem; background: #fafafa }
.card img { width: 100%; height: 9.6rem; object-fit: contain; background: #f0f0f0; display: block }
.card p { margin: 0; padding: .1rem .6rem } .card p:last-child { padding-bottom: .5rem }
.card .question { font-weight: 600; padding-top: .4rem; line-height: 1.3 }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
.warn { background: #fff4d6; border-left: 4px solid #e0a800; padding: .4rem .8rem; margin: .5rem 0 }
"""


def page(
    runs: list[Run],
    pairs: list[Pair],
    rows: list[Row],
    notes: list[str],
    warnings: list[str],
    num_examples: int,
    images: Path | None,
) -> str:
    """The whole report. `images` overrides the recorded folders of pictures; 0 examples need none."""
    names = [run.name for run in runs]
    parts = [
        f"<h1>{escape(' · '.join(names))}</h1>",
        *(f"<p>{escape(verdict(rows, pair))}</p>" for pair in pairs),
        *(f"<p>{escape(note)}</p>" for note in notes),
        *(f'<p class="warn">{escape(warning)}</p>' for warning in warnings),
        *map(as_html, paper_tables(runs)),
        "<h2>Results</h2>",
        *(_result(runs, rows, pair) for pair in pairs),
        '<p class="quiet">Accuracies in percent. A difference is in percentage points, paired by question; the brackets are its '
        "95% interval (bootstrap over pictures). Green and red: the interval leaves zero out. p: "
        "two-sided sign test over pictures, not corrected for the number of rows. n: questions. "
        "Chance: every question answered with another one's box, with a name at random, or in a random order.</p>",
        '<div class="plots">',
        *_accuracies(rows, names),
        "</div>",
        *_curves(runs, rows, names),
        *_groups(runs, rows, names),
        *(_examples(runs, pairs[0], rows, num_examples, images) if num_examples else ()),
        *_provenance(runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(' / '.join(names))}</title><style>{_CSS}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def verdict(rows: list[Row], pair: Pair) -> str:
    """The pair in one sentence: on how many benchmarks and splits the first is ahead, behind, or neither."""
    differences = [row.differences[pair] for row in rows if pair in row.differences and row.metric in JUDGED]
    ahead, behind = sum(d.low > 0 for d in differences), sum(d.high < 0 for d in differences)
    return (
        f"{pair.first} against {pair.second}, by accuracy: ahead on {ahead} of {len(differences)} benchmark splits, "
        f"behind on {behind}, no clear difference on {len(differences) - ahead - behind}."
    )


def percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed(interval: Interval) -> str:
    """`+3.2 [+1.1, +5.3]`, in percentage points."""
    if np.isnan(interval.low):
        return f"{100 * interval.value:+.1f} [one picture: no interval]".replace("-", "\N{MINUS SIGN}")
    text = f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def _result(runs: list[Run], rows: list[Row], pair: Pair) -> str:
    lines = []
    for row in (row for row in rows if pair in row.differences):
        difference = row.differences[pair]
        mark = ("ahead" if difference.value > 0 else "behind") if difference.excludes_zero else ""
        a, b = (percent(row.accuracies[name].value) for name in (pair.first, pair.second))
        value, _, limits = signed(difference).partition(" ")
        name = escape(row.name).replace("/", "/<wbr>")
        details = f"{METRIC_NAMES[row.metric]}, n {row.n:,}, chance&nbsp;{percent(row.chance)}"
        lines.append(
            f"<tr><td>{name}<small>{details}</small></td><td>{a}</td><td>{b}</td>"
            f'<td class="{mark}">{value}<small>{limits}</small></td>'
            f"<td><small>{row.signs[pair].better} : {row.signs[pair].worse}, p {p_value(row.signs[pair].p)}</small></td></tr>"
        )
    titles = ("benchmark / split", pair.first, pair.second, pair.title, "pictures better : worse")
    head = "".join(f"<th>{escape(text)}</th>" for text in titles).replace("\N{MINUS SIGN} ", "\N{MINUS SIGN}<br>")
    plot = _image(report_plots.differences(rows, pair), f"differences {pair.title}")
    table = f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>"
    remarks = "".join(f'<p class="quiet">{escape(sentence)}</p>' for sentence in variants_compared(runs, pair))
    return f'<div class="plots">{table}{plot}</div>{remarks}'


def _image(png: bytes, alt: str) -> str:
    return (
        f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}" style="width: {_width(png)}px">'
    )


def _width(png: bytes) -> int:
    """Width to show a plot at: it is drawn at one and a half times that, for dense screens."""
    return int(int.from_bytes(png[16:20]) / 1.5)


def _accuracies(rows: list[Row], names: list[str]) -> list[str]:
    return [
        _image(report_plots.accuracies(benchmark, [row for row in rows if row.name in splits], names), benchmark)
        for benchmark, splits in _by_benchmark(rows).items()
    ]


def _curves(runs: list[Run], rows: list[Row], names: list[str]) -> list[str]:
    plots = []
    for name in dict.fromkeys(row.name for row in rows if row.metric == "acc_50"):
        entries = {run.name: run.entries[name][0] for run in runs if name in run.entries}
        plots.append(_image(report_plots.iou_curve(name, entries, names), f"IoU curve {name}"))
    return ["<h2>How exact the boxes are</h2>", '<div class="plots">', *plots, "</div>"] if plots else []


def _groups(runs: list[Run], rows: list[Row], names: list[str]) -> list[str]:
    """Accuracy by kind of expression and by size of the box, the splits of a benchmark together."""
    plots = []
    for benchmark, splits in _by_benchmark(rows).items():
        pooled = {run.name: [run.entries[name][0] for name in splits] for run in runs if splits <= run.entries.keys()}
        if any(entry.scored.task in GRADED for entries in pooled.values() for entry in entries):
            continue
        kinds, sizes, lengths = {}, {}, {}
        for name, entries in pooled.items():
            hits = np.concatenate([entry.scored.hits for entry in entries])
            kind = np.concatenate([entry.scored.kinds for entry in entries])
            size = np.concatenate([entry.scored.sizes for entry in entries])
            kinds[name] = {str(label): hits[kind == label] for label in np.unique(kind) if label}
            sizes[name] = {size_name(i): hits[size == i] for i in range(len(SIZE_EDGES)) if (size == i).any()}
            words = np.array([min(len(t.text.split()), 8) for entry in entries for t in entry.evaluation.targets])
            lengths[name] = {_words(i): hits[words == i] for i in range(1, 9) if (words == i).any()}
        titled = {
            "by sort of expression": kinds,
            "by number of words": lengths,
            "by side of the box, % of the picture": sizes,
        }
        for title, groups in titled.items():
            found = {label: hits for label, hits in next(iter(groups.values()), {}).items() if len(hits) >= SMALLEST_GROUP}
            if found:
                labels = {label: [label.replace("_", "\n"), f"n {len(hits):,}"] for label, hits in found.items()}
                plots.append(_image(report_plots.by_group(f"{benchmark}\n{title}", labels, groups, names), title))
    said = f'<p class="quiet">Groups of fewer than {SMALLEST_GROUP} questions are not drawn. Bars: Wilson\'s 95% interval.</p>'
    return ["<h2>By kind of question</h2>", said, '<div class="plots">', *plots, "</div>"] if plots else []


def _words(number: int) -> str:
    return "8+" if number == 8 else str(number)


def _by_benchmark(rows: list[Row]) -> dict[str, set[str]]:
    grouped: dict[str, set[str]] = {}
    for row in rows:
        grouped.setdefault(row.name.partition("/")[0], set()).add(row.name)
    return grouped


def _examples(runs: list[Run], pair: Pair, rows: list[Row], count: int, images: Path | None) -> list[str]:
    by_name = {run.name: run for run in runs}
    first, second = by_name[pair.first], by_name[pair.second]
    colours = tuple(RUN_COLOURS[runs.index(run) % len(RUN_COLOURS)] for run in (first, second))
    parts = ["<h2>The same questions, both answers</h2>", _legend(pair, colours)]
    for benchmark, splits in _by_benchmark(rows).items():
        both = sorted(name for name in splits if name in first.entries and name in second.entries)
        if not both:
            continue
        entries: tuple[list[Entry], list[Entry]] = tuple([run.entries[name][0] for name in both] for run in (first, second))
        total = sum(len(entry.scored.ids) for entry in entries[0])
        parts.append(f"<h3>{escape(benchmark)}</h3>")
        graded = entries[0][0].scored.task in GRADED
        titles = {
            "first": f"{pair.first} is better" if graded else f"only {pair.first} is right",
            "second": f"{pair.second} is better" if graded else f"only {pair.second} is right",
            "neither": "both are wrong",
        }
        found = examples(*entries, count)
        for group in (group for group in found if not (graded and group == "neither")):
            number, chosen = found[group]
            share = f"{number:,} of {total:,} questions ({100 * number / total:.1f}%)"
            order = ", most disagreement first" if graded or entries[0][0].scored.iou is not None else ""
            parts.append(f"<p><b>{escape(titles[group][0].upper() + titles[group][1:])}</b>: {share}{order}</p>")
            cards = (_card(example, pair, colours, image_folder(example.evaluation, images)) for example in chosen)
            parts.append(f'<div class="cards">{"".join(cards)}</div>')
    return parts


def _legend(pair: Pair, colours: tuple[str, str]) -> str:
    items = zip((TRUTH_COLOUR, *colours), ("truth (dashed)", pair.first, pair.second), strict=True)
    return "<p>" + " &nbsp; ".join(f"{_swatch(colour)}{escape(name)}" for colour, name in items) + "</p>"


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background: {colour}"></span>'


def _card(example: Example, pair: Pair, colours: tuple[str, str], folder: Path) -> str:
    target = example.evaluation.targets[example.index]
    grounding = example.evaluation.protocol["task"] in ("grounding", "phrases")
    jpeg = base64.b64encode(draw_example(example, folder, colours)).decode()
    lines = [] if grounding or not target.category else [f"{_swatch(TRUTH_COLOUR)}{escape(target.category)}"]
    for name, colour, answer, score in zip((pair.first, pair.second), colours, example.answers, example.scores, strict=True):
        words = answer.raw.strip() or "(nothing)"
        if grounding:
            words = f"IoU {int(100 * score) / 100:.2f}" if answer.box else f"unparsed, {answer.reason}"
        lines.append(f"{_swatch(colour)}{escape(name)}: {escape(words[:80])}")
    question = target.text or "What is in the dashed box?"
    return (
        f'<div class="card"><img alt="{escape(target.text or target.category)}" src="data:image/jpeg;base64,{jpeg}">'
        f'<p class="question">{escape(question)}</p>{"".join(f"<p>{line}</p>" for line in lines)}</div>'
    )


def _provenance(runs: list[Run]) -> list[str]:
    """Which weights answered what, in which way: a line per evaluation."""
    parts = ["<h2>What was compared</h2>"]
    for run in runs:
        lines = [
            _provenance_line(entry, compared=len(variants) > 1 and place == 0)
            for variants in run.entries.values()
            for place, entry in enumerate(variants)
        ]
        head = '<th>evaluation</th><th>accuracy</th><th class="text">weights</th><th class="text">command</th>'
        parts.append(f"<h3>{escape(run.name)}</h3>")
        parts.append(f'<div class="scroll"><table class="small"><tr>{head}</tr>{"".join(lines)}</table></div>')
    return parts


def _provenance_line(entry: Entry, compared: bool) -> str:
    record, launch = entry.evaluation.run["model"], entry.evaluation.run["launches"][-1]
    accuracy = " / ".join(percent(entry.scored.accuracy(metric).value) for metric in entry.scored.metrics)
    name = entry.evaluation.name + (f", {entry.variant}" if entry.variant else "") + (" (compared)" if compared else "")
    facts = [f"{key} {value}" for key, value in record.items() if key not in ("weights_sha256", "variant")]
    cells = (
        ("text", name, str(entry.evaluation.protocol.get("completeness", ""))),
        ("", accuracy, ""),
        ("text", str(record.get("weights_sha256", "unknown"))[:12], ", ".join(facts)),
        ("wrap", launch["command"], f"{launch['started']}, commit {str(launch['commit'])[:12]}"),
    )
    return "<tr>" + "".join(f'<td class="{c}">{escape(t)}<small>{escape(s)}</small></td>' for c, t, s in cells) + "</tr>"
