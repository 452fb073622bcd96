"""A labelled collection as one self-contained HTML page: its statistics, and samples with their boxes drawn."""

import base64
from html import escape
from random import Random
from typing import Any

from PIL import ImageDraw

from encoder.drawing import as_jpeg, draw_box, shown
from encoder.errors import DataError
from encoder.vesl.stage_files import LabelFolder
from encoder.vesl.statistics import PUBLISHED, labelled_records

LONG_SIDE = 480  # pixels of a sample on the page
BOXES = 20  # of an image that are drawn, the most confident ones
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e07b00", "#17becf", "#e377c2", "#8c564b")
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem; max-width: 70rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } .quiet { color: #666; font-size: .9rem }
table { border-collapse: collapse } th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left } .scroll { overflow-x: auto }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem }
.card { border: 1px solid #ddd; border-radius: 6px; overflow: hidden; font-size: .9rem }
.card img { width: 100%; display: block } .card p { margin: .3rem .6rem }
.phrase { display: inline-block; margin-right: .7em } .phrase::before { content: "\\25A0"; margin-right: .2em; color: var(--c) }
"""


def page(folder: LabelFolder, found: dict[str, Any], chair: dict[str, Any], tokenizer: str, samples: int, seed: int = 0) -> str:
    """The page.

    found, chair: of `statistics` and `hallucination`; tokenizer: its name, for the table's caption
    samples: how many images to show, drawn from all by `seed`
    """
    rows = [("this collection", f"{found['images']:,}", *(found[key] for key in _COLUMNS))]
    rows += [(name, *values) for name, values in PUBLISHED.items()]
    lines = "".join(f"<tr>{''.join(f'<td>{_shown(value)}</td>' for value in row)}</tr>" for row in rows)
    heads = ("", "images", "regions an image", "image text", "region text")
    head = "".join(f"<th>{text}</th>" for text in heads)
    common = ", ".join(f"{escape(phrase)} ({count:,})" for phrase, count in found["most_common_phrases"].items())
    shares = (
        (chair["chair_i"], f"of {chair['named']:,} things named in captions"),
        (chair["chair_s"], f"of {chair['captions']:,} captions"),
        (chair["sentence"], f"of {chair['sentences']:,} sentences"),
    )
    hallucinated = "; ".join(f"{100 * share:.1f}% {of}" for share, of in shares if share is not None) or "no captions to check"
    body = f"""<h1>{escape(folder.path.name)}</h1>
<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>
<p class="quiet">Lengths in tokens of {escape(tokenizer)}, without end marks; the paper's (arXiv 2410.02746, Table 1) in tokens
of its own. {found["images_with_regions"]:,} images have regions; {found["different_phrases"]:,} different phrases.</p>
<p>Not found by the detector: {hallucinated}.</p>
<p class="quiet">Most common: {common or "none"}.</p>
<h2>{min(samples, found["images"])} images drawn at random</h2>
<div class="cards">{"".join(_cards(folder, found["images"], samples, seed))}</div>"""
    title = escape(folder.path.name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_CSS}</style></head><body>\n{body}\n</body></html>\n"
    )


_COLUMNS = ("regions_per_image", "image_text_tokens", "region_text_tokens")


def _shown(value: str | float | None) -> str:
    return "-" if value is None else escape(value) if isinstance(value, str) else f"{value:.1f}"


def _cards(folder: LabelFolder, images: int, samples: int, seed: int) -> list[str]:
    chosen = set(Random(seed).sample(range(images), min(samples, images)))
    return [_card(shard, sample, record) for n, (shard, sample, record) in enumerate(labelled_records(folder)) if n in chosen]


def _card(shard, sample, record: dict[str, Any]) -> str:
    try:
        picture, scale = shown(shard.image(sample), LONG_SIDE)
    except DataError as error:  # someone damaged the shard since it was written
        return f'<div class="card"><p>{escape(str(error))}</p></div>'
    draw, phrases = ImageDraw.Draw(picture), []
    best = sorted(record["regions"], key=lambda region: -region["score"])
    for number, region in enumerate(best[:BOXES]):
        colour = COLOURS[number % len(COLOURS)]
        draw_box(draw, [scale * value for value in region["box"]], colour)
        words = f"{region['phrases'][0]} {region['score']:.2f}"
        phrases.append(f'<span class="phrase" style="--c: {colour}">{escape(words)}</span>')
    if len(best) > BOXES:
        phrases.append(f'<span class="quiet">and {len(best) - BOXES} more</span>')
    jpeg = base64.b64encode(as_jpeg(picture)).decode()
    texts = [*record.get("captions", ()), *([f"alt-text: {record['alt_text']}"] if "alt_text" in record else ())]
    lines = "".join(f"<p>{escape(text)}</p>" for text in texts)
    return (
        f'<div class="card"><img alt="{escape(sample.key)}" src="data:image/jpeg;base64,{jpeg}">'
        f'<p>{"".join(phrases)}</p>{lines}<p class="quiet">{escape(sample.file or sample.key)}</p></div>'
    )
