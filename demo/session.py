"""What one visitor sees: a board, the turns of the chat, a sentence of status; and how a question is asked and answered."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image

from demo.board import NO_PICTURE, Board
from demo.models import Models, Settings, Speaker, one_line
from demo.pictures import Example, open_picture
from encoder.data.prompts import REFERRING_QUESTION
from encoder.errors import DataError
from mllm.chat import Answer

WELCOME = "Drag a box on the picture, or click a point: it gets a number, which a question can name."
PAUSE = 0.05  # seconds between two views of an answer that is coming


@dataclass
class Reply:
    """What one model said. answer: so far; marks: numbers of its boxes; error: why there is no more."""

    by: str
    answer: Answer
    marks: list[int] = field(default_factory=list)
    error: str = ""
    done: bool = False


@dataclass
class Turn:
    """A question as it was typed, the marks that it names, and a reply of each model."""

    question: str
    numbers: list[int]
    replies: list[Reply]


@dataclass(eq=False)  # one visitor is never another
class Session:
    """One visitor's chat.

    status: one sentence below the picture; question: what stands in the question box; suggestion: what of it we put there,
    and so may replace; labels: names that go with an example; stopped: the visitor wants no more of the answer
    """

    board: Board = field(default_factory=Board)
    turns: list[Turn] = field(default_factory=list)
    status: str = NO_PICTURE
    question: str = ""
    suggestion: str = ""
    labels: tuple[str, ...] = ()
    stopped: bool = False

    def start(
        self, picture: Image.Image | None = None, scale: float = 1.0, suggestion: str = "", labels: Sequence[str] = ()
    ) -> None:
        """An empty chat about a picture (RGB; scale: as of `Board`), or about none; `suggestion` goes into the question box."""
        status = NO_PICTURE if picture is None else WELCOME
        board = Board(picture, scale=scale, point_reach=self.board.point_reach)
        self.__init__(board, status=status, question=suggestion, suggestion=suggestion, labels=tuple(labels))

    def start_example(self, example: Example) -> None:
        self.start(example.image, suggestion=example.question, labels=example.labels)

    def put(self, path: str) -> None:
        """A new chat about the uploaded file; one that is no picture leaves the chat as it was."""
        try:
            self.start(*open_picture(path))
        except DataError as error:
            self.status = str(error)

    def draw(self, question: str, kind: str, points: Sequence) -> None:
        """A mark of the visitor's; it is asked about, unless `question` is their own."""
        self.question = question
        try:
            number = self.board.draw(kind, points)
        except DataError as error:
            self.status = str(error)
            return
        self.status = f"This is [{number}]; name it in a question by its number."
        if question.strip() in ("", self.suggestion):
            self.question = self.suggestion = REFERRING_QUESTION.format(f"[{number}]")

    def undo_mark(self, question: str) -> None:
        """Takes back the visitor's last mark."""
        self.question, drawn = question, self.board.drawn
        if not drawn:
            self.status = "There is no mark of yours to take back."
            return
        self.board.take_back(drawn[-1:])
        self.status = f"[{drawn[-1]}] is gone."
        if question == self.suggestion:
            self.question = self.suggestion = ""

    def undo_turn(self, question: str) -> None:
        """Takes back the last question with its answers and their boxes; it stands in the question box again."""
        self.question = question
        if not self.turns:
            self.status = "There is no question to take back."
            return
        turn = self.turns.pop()
        self.board.take_back(number for reply in turn.replies for number in reply.marks)
        self.question, self.status = turn.question, "The last question is taken back."

    def clear(self) -> None:
        """An empty chat about the same picture, which stays read."""
        self.start(self.board.picture, self.board.scale, labels=self.labels)

    def holds(self, turn: Turn) -> bool:
        """Whether a turn is still there: not taken back, and in no chat before this one."""
        return any(known is turn for known in self.turns)

    def stop(self) -> None:
        self.stopped = True


def ask(session: Session, question: str, models: Models, settings: Settings) -> Iterator[None]:
    """Asks all models, one token of each in turn, and yields when there is something new to see."""
    question, board = question.encode("utf-8", "replace").decode().strip(), session.board
    session.question = question
    try:
        speakers = models.ready
        text, numbers = board.read(question, models.reserved)
    except DataError as error:
        session.status = str(error)
        yield
        return
    turn = Turn(question, numbers, [Reply(speaker.name, Answer("", [], [], [], [])) for speaker in speakers])
    session.turns.append(turn)
    board.show(numbers)
    session.question, session.suggestion, session.stopped = "", "", False
    session.status = "The model is answering." if len(speakers) == 1 else "The models are answering."
    yield
    coming = {
        speaker.name: (reply, speaker, models.stream(session, speaker, turn, text, settings))
        for reply, speaker in zip(turn.replies, speakers, strict=True)
    }
    seen = time.monotonic()
    while coming and not session.stopped and session.holds(turn):
        for name, (reply, speaker, stream) in list(coming.items()):
            reply.done = not _hear(reply, speaker, stream, board, text)
            if reply.done:
                del coming[name]
        if time.monotonic() - seen > PAUSE:
            seen = time.monotonic()
            yield
    for reply, _, stream in coming.values():
        stream.close()
        reply.done = True
    if session.holds(turn):
        session.status = _summary(turn, session.stopped)
    yield


def _hear(reply: Reply, speaker: Speaker, stream: Iterator[str | Answer], board: Board, text: str) -> bool:
    """Takes the next piece of an answer; its boxes go onto the board. False at the end."""
    try:
        piece = next(stream, None)
    except (DataError, RuntimeError) as error:  # torch's own, such as a GPU that is full
        reply.error = one_line(error)
        return False
    if piece is None:
        return False
    picture = board.picture
    reply.answer = piece if isinstance(piece, Answer) else speaker.chat.read(reply.answer.text + piece, text, picture)
    for index in range(len(reply.marks), len(reply.answer.boxes)):
        reply.marks.append(board.answer(reply.answer.boxes[index], _named(reply.answer.phrases[index]), reply.by))
    return True


def _named(phrase: str) -> str:
    return "" if "<region" in phrase else phrase


def _summary(turn: Turn, stopped: bool) -> str:
    marks = [f"[{number}]" for reply in turn.replies for number in reply.marks]
    if stopped:
        return "The answer was stopped."
    if not marks:
        return WELCOME
    return f"{' and '.join(marks)} {'is' if len(marks) == 1 else 'are'} on the picture; ask about a box by its number."


def conversation(session: Session) -> dict:
    """The chat as a record: sizes and boxes (xyxy) in pixels of the visitor's own file."""
    board = session.board
    marks = [
        {
            "number": mark.number,
            "kind": mark.kind,
            "box": board.to_file(mark.box),
            **({"points": [board.to_file(point) for point in mark.points]} if mark.points else {}),
            **({"phrase": mark.phrase, "by": mark.by} if mark.kind == "answer" else {}),
        }
        for mark in board.marks.values()
    ]
    turns = [
        {"question": turn.question, "marks": turn.numbers, "answers": [reply_record(reply, board) for reply in turn.replies]}
        for turn in session.turns
    ]
    size = (
        {}
        if board.picture is None
        else dict(zip(("width", "height"), map(round, board.to_file(board.picture.size)), strict=True))
    )
    return {"picture": size, "marks": marks, "turns": turns}


def reply_record(reply: Reply, board: Board) -> dict:
    """A reply: the model's own text, and its boxes in pixels of the visitor's own file."""
    numbers = reply.marks or [None] * len(reply.answer.boxes)
    found = zip(numbers, reply.answer.boxes, reply.answer.phrases, strict=False)
    boxes = [{"mark": number, "box": board.to_file(box), "phrase": _named(phrase)} for number, box, phrase in found]
    record = {"by": reply.by, "text": reply.answer.text, "boxes": boxes, "unread": reply.answer.unread}
    return record | ({"error": reply.error} if reply.error else {})
