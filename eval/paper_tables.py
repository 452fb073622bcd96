"""The paper's Tables 4 and 5 (arXiv 2410.02746) with rows of one's own below the published ones, as Markdown, LaTeX and HTML.

Numbers are percent, as printed there, the average too. Table 5 averages 13 columns, Table 4 three; a run's average is left
empty where a column is.
"""

from dataclasses import dataclass
from html import escape

from eval.comparison import Run

# Column, of Table 5 its data set and what of it -> (benchmark and split, metrics to take, the first that is there).
REFERRING = {
    "RefLVIS box": ("reflvis/box", ("ferret_rule", "two_choice")),
    "RefLVIS point": ("reflvis/point", ("ferret_rule", "two_choice")),
    "RefLVIS free": ("reflvis/free_form", ("ferret_rule", "two_choice")),
    "RefCOCO val": ("refcoco/val", ("acc_50",)),
    "RefCOCO testA": ("refcoco/testA", ("acc_50",)),
    "RefCOCO testB": ("refcoco/testB", ("acc_50",)),
    "RefCOCO+ val": ("refcoco+/val", ("acc_50",)),
    "RefCOCO+ testA": ("refcoco+/testA", ("acc_50",)),
    "RefCOCO+ testB": ("refcoco+/testB", ("acc_50",)),
    "RefCOCOg val": ("refcocog/val", ("acc_50",)),
    "RefCOCOg test": ("refcocog/test", ("acc_50",)),
    "Flickr30k val": ("flickr30k_entities/val", ("merged_box",)),
    "Flickr30k test": ("flickr30k_entities/test", ("merged_box",)),
}
BENCH = {
    "Referring description": ("ferret_bench/refer_desc", ("judged",)),
    "Referring reasoning": ("ferret_bench/refer_reason", ("judged",)),
    "Grounding in conversation": ("ferret_bench/ground_conv", ("judged",)),
}
_NONE = None
PUBLISHED_REFERRING = {
    "CLIP B/16": (72.5, 56.9, 57.2, 80.7, 84.2, 77.1, 71.9, 76.1, 63.7, 75.9, 76.2, 76.2, 78.3, 72.8),
    "CLOC B/16": (74.3, 56.7, 60.2, 84.2, 87.0, 80.0, 74.7, 80.0, 67.0, 78.8, 79.5, 80.0, 81.5, 75.7),
    "CLOC* B/16": (78.9, 58.2, 61.4, 84.4, 86.8, 78.9, 74.0, 78.7, 65.5, 78.0, 78.7, 80.1, 81.4, 75.8),
    "Shikra, OpenAI L/14": (57.8, 67.7, _NONE, 87.0, 90.6, 80.2, 81.6, 87.4, 72.1, 82.3, 82.2, 75.8, 76.5, _NONE),
    "Ferret, OpenAI L/14": (79.4, 67.9, 69.8, 87.5, 91.4, 82.5, 80.8, 87.4, 73.1, 83.9, 84.8, 80.4, 82.2, 80.8),
    "CLIP L/14": (78.7, 66.9, 70.2, 88.0, 90.4, 83.5, 80.1, 85.8, 73.3, 82.8, 83.4, 79.0, 80.1, 80.2),
    "CLOC L/14": (81.6, 67.9, 69.9, 89.0, 91.0, 84.7, 81.4, 86.8, 74.7, 84.0, 85.2, 82.3, 83.3, 81.7),
    "CLOC* L/14": (79.8, 67.9, 69.1, 88.2, 91.1, 84.5, 80.6, 86.7, 73.9, 84.8, 85.1, 82.4, 83.5, 81.4),
}
PUBLISHED_BENCH = {
    "CLIP B/16": (47.5, 50.3, 45.3, 47.7),
    "CLOC B/16": (53.6, 53.7, 42.2, 49.8),
    "CLOC* B/16": (54.8, 54.9, 44.7, 51.5),
    "OpenAI-CLIP L/14": (50.8, 55.4, 45.7, 50.6),
    "CLIP L/14": (54.2, 54.6, 43.3, 50.7),
    "CLOC L/14": (55.9, 63.3, 46.0, 55.1),
    "CLOC* L/14": (56.3, 67.4, 47.1, 56.9),
}


@dataclass(frozen=True)
class PaperTable:
    """rows: (name, a number or None per column, whether published); the average is the last column; notes: below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...], bool], ...]
    notes: tuple[str, ...]


def paper_tables(runs: list[Run]) -> list[PaperTable]:
    """Those of the two tables that some run has a column of."""
    referring = _table(
        "Table 5: referring and grounding", REFERRING, PUBLISHED_REFERRING, runs,
        "* the Prompter in place of Ferret's sampler. RefLVIS is drawn anew: own rows are of other objects than the paper's. "
        "Shikra's RefLVIS is as printed; Ferret's paper has box and point the other way round.",
    )  # fmt: skip
    bench = _table(
        "Table 4: Ferret-Bench", BENCH, PUBLISHED_BENCH, runs,
        "Published rows: judge gpt-4o. Marks of another judge cannot be set beside them.",
    )  # fmt: skip
    return [table for table in (referring, bench) if table]


def _table(title: str, columns: dict, published: dict, runs: list[Run], note: str) -> PaperTable | None:
    own, notes = [], [note]
    for run in runs:
        values = []
        for column, (name, metrics) in columns.items():
            entries = run.entries.get(name)
            # Own data in a folder called refcoco are no RefCOCO; RefLVIS is always drawn anew, which the note says.
            if entries and not name.startswith("reflvis") and entries[0].evaluation.protocol.get("completeness") == "own data":
                entries = None
            metric = next((m for m in metrics if entries and m in entries[0].scored.metrics), None)
            values.append(100 * entries[0].scored.accuracy(metric).value if metric else None)
            if metric:
                whole = str(entries[0].evaluation.protocol.get("completeness", ""))
                if whole != "published" and not whole.startswith("complete") and not name.startswith("reflvis"):
                    notes.append(f"{run.name}, {column}: {whole or 'not checked'}.")
        if any(value is not None for value in values):
            own.append((run.name, with_average(values), False))
    if not own:
        return None
    rows = [(name, values, True) for name, values in published.items()]
    return PaperTable(title, (*columns, "average"), (*rows, *own), tuple(dict.fromkeys(notes)))


def with_average(values) -> tuple[float | None, ...]:
    """The values and their mean, which is None where one is."""
    values = tuple(values)
    return (*values, None if None in values else sum(values) / len(values))


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def as_markdown(table: PaperTable) -> str:
    lines = [f"## {table.title}", "", "| | " + " | ".join(table.columns) + " |", "|---|" + "---|" * len(table.columns)]
    for name, values, published in table.rows:
        label = name.replace("*", r"\*") if published else f"**{name}**"
        lines.append(f"| {label} | " + " | ".join(map(cell, values)) + " |")
    return "\n".join([*lines, "", *(note.replace("*", r"\*") + "  " for note in table.notes), ""])


def tex(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
    }
    return "".join(special.get(c, c) for c in text).replace("\N{MINUS SIGN}", "$-$")


def grouped(columns: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """Columns side by side of one data set: `RefCOCO val`, `RefCOCO testA` -> ("RefCOCO", ["val", "testA"]).

    One that shares its first word with none beside it stands under "", by its whole name.
    """
    groups: list[tuple[str, list[str]]] = []
    for column in columns:
        first, _, rest = column.partition(" ")
        if groups and groups[-1][0] == first:
            groups[-1][1].append(rest)
        else:
            groups.append((first, [rest]))
    return [(f, rests) if len(rests) > 1 else ("", [f"{f} {rests[0]}".strip()]) for f, rests in groups]


def as_latex(table: PaperTable) -> str:
    """A `tabular` with booktabs' rules: data sets over their columns, published rows, a rule, own rows."""
    lines = [f"% {table.title}", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    groups, rules, place = grouped(table.columns), [], 2
    for name, members in groups:
        end = place + len(members) - 1
        rules += [rf"\cmidrule(lr){{{place}-{end}}}"] if name else []
        place = end + 1
    if rules:
        heads = (rf"\multicolumn{{{len(members)}}}{{c}}{{{tex(name)}}}" for name, members in groups)
        lines += [" & " + " & ".join(heads) + r" \\", "".join(rules)]
    lines.append(" & " + " & ".join(tex(member) for _, members in groups for member in members) + r" \\")
    lines.append(r"\midrule")
    was_published = True
    for name, values, published in table.rows:
        if was_published and not published:
            lines.append(r"\midrule")
        was_published = published
        lines.append(tex(name) + " & " + " & ".join(map(cell, values)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes), ""])


def as_html(table: PaperTable) -> str:
    groups = grouped(table.columns)
    over = "".join(f'<th class="group" colspan="{len(members)}">{escape(name)}</th>' for name, members in groups)
    over = f'<tr><th class="group"></th>{over}</tr>' if any(name for name, _ in groups) else ""
    head = "<th></th>" + "".join(f"<th>{escape(member)}</th>" for _, members in groups for member in members)
    rows = []
    for name, values, published in table.rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in values)
        label = escape(name) + ("<small>published</small>" if published else "")
        row = "<tr>" if published else '<tr class="own">'
        rows.append(f"{row}<td>{label}</td>{cells}</tr>")
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in table.notes)
    body = f'<div class="scroll"><table class="small paper">{over}<tr>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h2>{escape(table.title)}</h2>{body}{notes}"
