"""How long a visitor waits for an answer's first token: on a picture that is new, and on one that was asked about before.

    python benchmarks/chat_latency.py [--model DIR] [--dtype bfloat16] [--rounds 5] [--out FILE]

The chat keeps what it has read: a second question does not run the tower and the picture's tokens again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rounds import Bar, in_turn, report_of, show
from shared_prefix import draw_pictures

from encoder.data.prompts import GROUNDING_QUESTION
from encoder.errors import DataError, run_main
from eval.answering import DTYPES
from mllm.chat import GroundingChat, Talk

BARS = [Bar("first question", "second question", 2, at_least=True)]
QUESTIONS = [GROUNDING_QUESTION.format(f"the {name}") for name in ("red square", "green circle", "shape on the left")]


def first_token(talk: Talk, question: str) -> None:
    """Asks, without the turns before, and breaks off at the first piece of the answer."""
    talk.keep(0)
    stream = talk.stream(question, max_new_tokens=16)
    next(stream)
    stream.close()


def make_variants(chat: GroundingChat, pictures: list) -> dict[str, Callable[[], None]]:
    """What is timed, by name: one question on each picture."""
    talks = [chat.talk(picture) for picture in pictures]
    for talk in talks:
        first_token(talk, QUESTIONS[0])
    asked = [0]

    def first() -> None:
        for picture in pictures:
            first_token(chat.talk(picture), QUESTIONS[1])

    def second() -> None:
        asked[0] += 1
        for talk in talks:
            first_token(talk, QUESTIONS[asked[0] % len(QUESTIONS)])

    return {"first question": first, "second question": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "weights/mllm_cloc"
    parser.add_argument("--model", type=Path, default=default, help="MLLM folder; default: the shipped one")
    parser.add_argument("--pictures", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.pictures < 1 or args.rounds < 1:
        raise DataError(f"--pictures is {args.pictures} and --rounds {args.rounds}; give at least 1 of each")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = GroundingChat.from_pretrained(args.model, str(device), DTYPES[args.dtype])
    variants = make_variants(chat, draw_pictures(args.pictures))
    for work in variants.values():
        work()
    report = report_of(in_turn(variants, args.rounds, device), BARS, device)
    for medians in report["variants"].values():
        medians["seconds_to_first_token"] = medians["seconds"] / args.pictures
    show(report, args.out)
    waits = ", ".join(f"{name} {1000 * medians['seconds_to_first_token']:.1f} ms" for name, medians in report["variants"].items())
    print(f"to the first token: {waits}")


if __name__ == "__main__":
    run_main(main)
