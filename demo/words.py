"""The chat as the page shows it: messages in HTML with every mark in its colour, and the board as what its script draws."""

import html

from demo.board import ENCODER, NAMED, Board, Mark
from demo.drawing import colour
from demo.pictures import data_url
from demo.session import Reply, Session


def chip(number: int, words: str | None = None, title: str = "") -> str:
    """HTML: words (HTML; the mark's number, where there are none) in the mark's colour. `n<number>` links it to the picture."""
    hint = f' title="{html.escape(title)}"' if title else ""
    return f'<span class="chip n{number}"{hint} style="background-color: {colour(number)}">{words or f"[{number}]"}</span>'


def question_html(question: str) -> str:
    """A question: every "[1]" in its mark's colour."""
    return _block(NAMED.sub(lambda match: chip(int(match[1])), html.escape(question)))


def replies_html(replies: list[Reply], board: Board) -> str:
    """The replies to one question: one alone, or two side by side under their models' names."""
    if len(replies) == 1:
        return _block(reply_html(replies[0], board))
    cells = (f"<div><b>{html.escape(reply.by)}</b><br>{reply_html(reply, board)}</div>" for reply in replies)
    return f'<div class="pair">{"".join(cells)}</div>'


def reply_html(reply: Reply, board: Board) -> str:
    """An answer: the words that a box belongs to in its colour, and a box that is none with the reason."""
    answer, words, before = reply.answer, "", 0
    for (start, end), number, phrase, box in zip(answer.spans, reply.marks, answer.phrases, answer.boxes, strict=False):
        between = answer.text[before:start]
        where = "{:.0f}, {:.0f} to {:.0f}, {:.0f} px".format(*board.to_file(box))
        named, place = html.escape(phrase), between.rfind(phrase) if phrase else -1
        after = between[place + len(phrase) :]
        if place >= 0 and not after.strip():  # the phrase stands before its box
            words += html.escape(between[:place]) + chip(number, f"[{number}] {named}", where)
        elif place >= 0:
            words += html.escape(between[:place]) + chip(number, named) + html.escape(after) + chip(number, title=where)
        elif not between.strip() and "<region" not in phrase:  # what was asked for
            words += chip(number, f"[{number}] {named}".strip(), where)
        else:
            words += html.escape(between) + chip(number, title=where)
        before = end
    words += html.escape(answer.text[before:])
    if reply.done and not words.strip() and not reply.error:
        words = "<i>The model said nothing.</i>"
    notes = [f"{reason}; it is not drawn." for reason in answer.unread] + ([reply.error] if reply.error else [])
    return (words or "…") + "".join(f"<br><small>{html.escape(note)}</small>" for note in notes)


def _block(words: str) -> str:
    return f'<div dir="auto">{words}</div>'  # no Markdown in a block of HTML


def messages(session: Session) -> list[dict[str, str]]:
    """The chat as `gradio.Chatbot` takes it."""
    said = []
    for turn in session.turns:
        said.append({"role": "user", "content": question_html(turn.question)})
        said.append({"role": "assistant", "content": replies_html(turn.replies, session.board)})
    return said


def status_html(sentence: str) -> str:
    return f'<div role="status">{html.escape(sentence)}</div>'


def ranking_html(rows: list[tuple[int, list[tuple[str, float, float]]]], shown: int = 5) -> str:
    """For each mark's number its best labels, each with a bar for its share and its cosine."""
    parts = []
    for number, ranked in rows:
        bars = "".join(
            f'<tr><td>{html.escape(label)}</td><td><div class="bar" style="width: {100 * share:.1f}%; background-color: '
            f'{colour(number)}"></div></td><td>{100 * share:.1f}%</td><td>{cosine:.3f}</td></tr>'
            for label, cosine, share in ranked[:shown]
        )
        head = f"<tr><th>{chip(number)}</th><th></th><th>share</th><th>cosine</th></tr>"
        parts.append(f'<table class="ranking">{head}{bars}</table>')
    return "".join(parts)


def board_value(board: Board, names: list[str]) -> dict | None:
    """What the script of the board draws: the picture once for each model of `names`, with the marks that it shows."""
    if board.picture is None:
        return None
    panes = []
    for name in names:
        marks = [_mark(mark, mark.number in board.shown) for mark in board.marks.values() if mark.by in ("", ENCODER, name)]
        panes.append({"title": name if len(names) > 1 else "", "marks": marks})
    width, height = board.picture.size
    return {"picture": data_url(board.picture), "width": width, "height": height, "panes": panes}


def _mark(mark: Mark, shown: bool) -> dict:
    return {
        "number": mark.number,
        "kind": mark.kind,
        "box": list(mark.box),
        "points": [list(point) for point in mark.points],
        "colour": colour(mark.number),
        "title": mark.phrase or f"[{mark.number}]",
        "shown": shown,
    }
