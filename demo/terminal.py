"""The chat without a browser: marks and questions as lines, boxes in pixels as answers, and the annotated picture as a file.

    python demo/terminal.py PICTURE [--model DIR] [--compare DIR] [--out annotated.png]

    box 4 43 24 68        a mark: a box, x1 y1 x2 y2 in pixels; "point 14 55" is a point
    What is [1]?          anything else is a question; [1] is the mark of that number
    undo | clear | picture PATH | save chat.json | quit

Lines come from the keyboard or from a pipe. Without PICTURE an example is taken. The picture is written after each answer.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from demo.app import add_model_arguments, models_of
from demo.board import MAX_QUESTION
from demo.drawing import draw_marks
from demo.models import Models, Settings
from demo.pictures import draw_examples, open_picture
from demo.session import Session, ask, conversation
from encoder.errors import DataError, run_main


def answer(session: Session, question: str, models: Models, settings: Settings) -> Iterator[str]:
    """What is printed for a question: the words of one model as they come, of two one after the other, then the boxes."""
    before, said = len(session.turns), ""
    for _ in ask(session, question, models, settings):
        if len(session.turns) == before + 1 and len(session.turns[-1].replies) == 1:
            text = session.turns[-1].replies[0].answer.text
            yield text[len(said) :]
            said = text
    if len(session.turns) == before:
        raise DataError(session.status)
    for reply in session.turns[-1].replies:
        if len(session.turns[-1].replies) > 1:
            yield f"{reply.by}: {reply.answer.text}"
        yield "\n"
        for number in reply.marks:
            yield place(session, number)
        for note in [*reply.answer.unread, *([reply.error] if reply.error else [])]:
            yield f"  {note}\n"


def place(session: Session, number: int) -> str:
    """A mark's line: its number, its box in pixels, and what it is said to be."""
    mark = session.board.marks[number]
    return (
        f"  [{number}] {' '.join(f'{value:.1f}' for value in session.board.to_file(mark.box))} px  {mark.phrase}".rstrip() + "\n"
    )


def obey(session: Session, line: str, models: Models, settings: Settings, out: Path) -> Iterator[str]:
    """One line of the user's; yields what is printed."""
    word, *rest = line.split()
    numbers = [number_or_none(text) for text in rest]
    if word in ("box", "point") and rest and None not in numbers:
        if len(numbers) != {"box": 4, "point": 2}[word]:
            raise DataError(
                f"A {word} is {'x1 y1 x2 y2' if word == 'box' else 'x y'} in pixels, this has {len(numbers)} numbers."
            )
        numbers = [value / session.board.scale for value in numbers]
        number = session.board.draw(word, [numbers[:2], numbers[2:]][: len(numbers) // 2])
        yield place(session, number)
    elif line == "undo":
        session.undo_turn("") if session.turns else session.undo_mark("")
        yield f"{session.status}\n"
    elif line == "clear":
        session.clear()
        yield f"{session.status}\n"
    elif word == "picture" and len(rest) == 1:
        session.start(*open_picture(rest[0]))
        yield f"{size_of(session)}\n"
    elif word == "save" and len(rest) == 1:
        Path(rest[0]).write_text(json.dumps(conversation(session), indent=1, ensure_ascii=False) + "\n")
        yield f"the conversation is in {rest[0]}\n"
    else:
        yield from answer(session, line, models, settings)
        board = session.board
        draw_marks(board.picture, (board.marks[number] for number in board.shown)).save(out)


def size_of(session: Session) -> str:
    """The picture's size, in pixels of the user's own file."""
    return "{:.0f} x {:.0f} px".format(*session.board.to_file(session.board.picture.size))


def number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", help="PNG, JPEG, WebP, GIF, BMP or TIFF; default: an example")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("annotated.png"), help="the annotated picture (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest word each time")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default %(default)s)")
    arguments = parser.parse_args()
    session = Session()
    session.board.point_reach = arguments.point_reach
    if arguments.picture is None:
        session.start_example(draw_examples()[0])
        print(f"an example; one may ask: {session.question}")
    else:
        session.start(*open_picture(arguments.picture))
    models = models_of(arguments)
    for error in models.errors:
        print(error, file=sys.stderr)
    settings = Settings(arguments.temperature, arguments.max_new_tokens, models.long_memory)
    print(f"{size_of(session)}; a question has at most {MAX_QUESTION} characters; quit ends")
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "quit":
            break
        try:
            for piece in obey(session, line.strip(), models, settings, arguments.out) if line.strip() else ():
                print(piece, end="", flush=True)
        except (DataError, OSError) as error:
            print(error, flush=True)
    if session.turns:
        print(f"\nthe annotated picture is in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
