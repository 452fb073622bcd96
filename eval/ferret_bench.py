"""Ferret-Bench: 120 questions that refer to regions or ask for them, answered by an MLLM and marked by a judge.

    python eval/ferret_bench.py --model runs/mllm_cloc --data ferret_gpt4_data --images val2017 --out runs/eval_cloc \
        --judge-url http://localhost:8000/v1 --judge MODEL
    python eval/ferret_bench.py ... --judge FOLDER_OF_A_LANGUAGE_MODEL

The judge sees objects and captions of the picture as text, the question, a reference answer and ours, and gives each a mark
from 1 to 10; the score is 100 * (mean of our marks) / (mean of the reference's). Answers come first and stay; replies of the
judge are kept. Without --judge only the answers are written. Scores of other judges are not comparable.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from encoder.errors import DataError, run_main
from encoder.geometry import Geometry
from eval.json_lines import json_lines
from eval.judge import Judge
from eval.local_judge import LocalJudge
from eval.predictions import Prediction, Target, load_evaluation, write_whole
from eval.runner import Part, benchmark_parser, image_folder, needs_words, picture_size, run_benchmark
from eval.scoring import score_folder, score_run
from mllm.box_text import BoxCodec

# Category -> its folder, by both of the names it has had.
FOLDERS = {
    "refer_desc": ("refer_desc", "refer_caption"),
    "refer_reason": ("refer_reason",),
    "ground_conv": ("ground_conv",),
}
QUESTIONS = 40  # of each category
REPLY_TOKENS = 1024  # the longest reply of a judge
BRACKET = re.compile(r"\[([^\[\]]*)\]")
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def category_folder(data: Path, category: str) -> Path:
    found = [data / name for name in FOLDERS[category] if (data / name / "question.jsonl").is_file()]
    if not found:
        raise DataError(f"{data} has no {FOLDERS[category][0]}/question.jsonl; give ferret/eval/ferret_gpt4_data of ml-ferret")
    return found[0]


def read_part(args: argparse.Namespace, category: str) -> Part:
    """The questions of a category; `text` of a target is the question as in the file, with regions in [0, 1]."""
    targets, images = [], image_folder(args)
    rows = json_lines(category_folder(args.data, category) / "question.jsonl")
    for row, where in rows:
        try:
            number, image, text = row["question_id"], row["image"].split("/")[-1], row["text"]
        except (KeyError, AttributeError) as error:
            raise DataError(f"{where}: not a question of Ferret-Bench ({error!r}); it has question_id, image and text") from None
        width, height = picture_size(images, image, where)
        regions_of(text, width, height)
        targets.append(Target(str(number), image, width, height, text, (0.0, 0.0, float(width), float(height)), "", category))
    whole = "published" if len(rows) == QUESTIONS else f"PARTIAL: the file has {len(rows)} of {QUESTIONS} questions"
    return Part("ferret_bench", category, "judged", targets, whole, {"max_new_tokens": args.max_new_tokens})


def regions_of(text: str, width: int, height: int) -> tuple[str, list]:
    """A question with `<region:i>` for its brackets, and their boxes in pixels."""
    boxes: list[tuple[float, ...]] = []

    def region(match: re.Match) -> str:
        try:
            x1, y1, x2, y2 = map(float, match[1].split(","))
        except ValueError:
            raise DataError(f"question '{text}': [{match[1]}] is no box of four numbers in [0, 1]; correct the file") from None
        boxes.append((x1 * width, y1 * height, min(x2, 1.0) * width, min(y2, 1.0) * height))
        return f"<region:{len(boxes) - 1}>"

    return BRACKET.sub(region, text), boxes


def for_the_judge(answer: str, target: Target, protocol: dict) -> str:
    """The answer as the judge reads it: its boxes in [0, 1] of the picture where boxes were asked for, else without them.

    protocol: names the codec and the geometry that the answer was written in
    """
    codec = BoxCodec(protocol["codec"])
    if target.kind != "ground_conv":
        return BRACKET.sub("", codec.replace(answer, lambda box: "")).replace("  ", " ").strip()
    geometry = Geometry(protocol["geometry"], target.width, target.height, 1000)

    def shares(box) -> str:
        sides = (target.width, target.height, target.width, target.height)
        corners = geometry.boxes_to_image(box).tolist()
        return "[" + ", ".join(f"{value / side:.3f}" for value, side in zip(corners, sides, strict=True)) + "]"

    return codec.replace(answer, shares)


def marks_in(reply: str) -> tuple[float, float] | None:
    """(reference's, ours) of the reply's first line behind what the judge thought: two numbers apart by a blank or comma;
    None for anything else."""
    lines = THOUGHT.sub("", reply).strip().splitlines()
    numbers = lines[0].replace(",", " ").split() if lines else []
    try:
        first, second = map(float, numbers)
    except ValueError:
        return None
    return (first, second) if 0 < first <= 10 and 0 < second <= 10 else None


def judge_category(folder: Path, data: Path, judge: Judge) -> dict:
    """Marks of all answers of a category, written to `judged.json`; replies that are there already are not asked for again.

    A reply without two marks is left out of both means and counted.
    """
    evaluation = load_evaluation(folder)
    category = evaluation.protocol["split"]
    source = category_folder(data, category)
    rules = _rules(data)[category]
    context = {row["image"]: row["text"] for row, _ in json_lines(source / "context.jsonl")}
    reference = {str(row["question_id"]): row["text"] for row, _ in json_lines(source / "answer.jsonl")}
    marks, unread = [], []
    pairs = list(zip(evaluation.targets, evaluation.predictions, strict=True))
    for target, prediction in tqdm(pairs, desc=f"judge, {category}", unit="reply"):
        if target.id not in reference or target.image not in context:
            raise DataError(f"{source}: question {target.id} has no reference answer or no context; take one version's files")
        content = _content(target, prediction, evaluation.protocol, rules, context[target.image], reference[target.id])
        found = marks_in(judge.reply(content))
        if found:
            marks.append({"id": target.id, "reference": found[0], "ours": found[1]})
        else:
            unread.append(target.id)
    if not marks:
        raise DataError(f"judge '{judge.model}': no reply begins with two marks from 1 to 10; choose a stronger one")
    means = {key: sum(mark[key] for mark in marks) / len(marks) for key in ("reference", "ours")}
    result = {
        "score": 100 * means["ours"] / means["reference"],
        "mean_marks": means,
        "n": len(marks),
        "without_marks": unread,
        "judge": judge.record,
        "rule_sha256": hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest(),
        "completeness": evaluation.protocol["completeness"],
        "marks": marks,
    }
    write_whole(folder / "judged.json", json.dumps(result, indent=1) + "\n")
    return result


def _rules(data: Path) -> dict:
    path = data / "rule.json"
    try:
        rules = json.loads(path.read_text())
        return {category: {key: rules[category][key] for key in ("role", "prompt")} for category in FOLDERS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not Ferret-Bench's rules ({error!r}); take the file from ml-ferret") from None


def _content(target: Target, prediction: Prediction, protocol: dict, rules: dict, context: str, reference: str) -> str:
    """What is put to the judge, in the order of the official script."""
    role, ours = rules["role"], for_the_judge(prediction.raw, target, protocol)
    return (
        f"[Context]\n{context}\n\n[Question]\n{target.text}\n\n"
        f"[{role} 1]\n{reference}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{ours}\n\n[End of {role} 2]\n\n"
        f"[System]\n{rules['prompt']}\n\n"
    )


def main() -> None:
    parser = benchmark_parser(__doc__, data="ferret/eval/ferret_gpt4_data of ml-ferret")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", help="its name, as its server calls it, or a language model's folder; there is no default")
    group.add_argument("--judge-url", help="address of chat completions up to /v1, where --judge is no folder")
    group.add_argument("--judge-key", default="OPENAI_API_KEY", help="environment variable with the key (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.2, help="of the judge (default: %(default)s, Ferret's)")
    args = parser.parse_args()
    if args.judge_url and args.judge is None or args.judge and not args.judge_url and not Path(args.judge).is_dir():
        raise DataError("--judge and --judge-url are given together, which model and where, or --judge alone with a folder")
    unknown = set(args.split or ()) - FOLDERS.keys()
    if unknown:
        raise DataError(f"--split {sorted(unknown)[0]} is no category; choose among {', '.join(FOLDERS)}")
    if args.score_only and args.judge is None:
        return score_run(args.out)
    if args.score_only and args.data is None:
        raise DataError("--score-only with --judge asks the judge about the answers, for which --data is needed")

    def ask(answerer, part: Part):
        mllm = needs_words(answerer, args.model)
        return mllm.asks(lambda t: regions_of(t.text, t.width, t.height), args.max_new_tokens)

    if not args.score_only:
        run_benchmark(args, lambda: [read_part(args, c) for c in args.split or FOLDERS], ask=ask, scored=False)
    if args.judge is None or int(os.environ.get("RANK", "0")) > 0:  # the judge is asked by one process
        return
    cache = args.out / "ferret_bench" / "judge"
    if args.judge_url:
        judge = Judge(args.judge_url, args.judge, cache, args.temperature, REPLY_TOKENS, args.judge_key)
    else:
        judge = LocalJudge(Path(args.judge), cache, args.temperature, REPLY_TOKENS, args.device)
    scores = []
    for category in args.split or FOLDERS:
        folder = args.out / "ferret_bench" / category
        result = judge_category(folder, args.data, judge)
        scores.append(result["score"])
        judged = score_folder(folder)["judged"]
        limits = f"[{100 * judged['low']:.1f}, {100 * judged['high']:.1f}]"
        counts = f"n {result['n']}  without marks {len(result['without_marks'])}  ({result['completeness']})"
        print(f"ferret_bench/{category:<14} {result['score']:.1f} {limits}  {counts}")
    print(f"mean of {len(scores)} categories {sum(scores) / len(scores):.1f}, judge {args.judge}: {args.out / 'ferret_bench'}")


if __name__ == "__main__":
    run_main(main)
