"""What a model answered, on disk, apart from whether it was right.

One evaluation is one folder, `RUN/<benchmark>/<split>[/<variant>]/`:
    run.json           protocol (what was asked and how), model (which weights), launches (command, commit, versions)
    targets.jsonl      the questions with their true answers, one JSON object per line
    predictions.jsonl  id, image, prompt, raw text, parsed box, reason if there is none; one line per question
    scores.json        written by scoring, from the two files above alone
Whole lines are appended and synced, so a killed run loses at most the batch it was in and goes on by id. Of several
processes the others write `predictions.rankN.jsonl`, which is joined to predictions.jsonl when all are done, or resumed.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from encoder.distributed import rank, world_size
from encoder.errors import DataError
from eval.json_lines import json_lines
from eval.processes import first_does, wait_for_all

Box = tuple[float, float, float, float]
AGAIN = "remove that line, or the folder, and evaluate again"


@dataclass(frozen=True)
class Target:
    """One question and its true answer.

    id: unique within the evaluation; image: path relative to the folder of images; width, height: its size in pixels
    text: what was asked about (an expression), empty where the question is a box
    box: xyxy, pixels of the original image; category: the object's name; kind: sort of expression, where the data say
    boxes: all boxes of the object, where any of them or the one around them is right; empty where `box` is the only one
    answers: words that are right; choices: words to choose among, in the order asked
    region: what points at the object in the question, a record's object with `point` or `mask`; None where the box does
    """

    id: str
    image: str
    width: int
    height: int
    text: str
    box: Box
    category: str
    kind: str = ""
    boxes: tuple[Box, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    region: dict | None = None


@dataclass(frozen=True)
class Prediction:
    """One answer.

    prompt: the words put to the model; raw: its words, untouched
    box: what they say, xyxy in pixels of the original image, or None; reason: why there is no box, or None
    place: where candidates were ranked, how many wrong ones score higher than the best right one, how many wrong ones
        score the same, and how many right ones do; None elsewhere
    """

    id: str
    image: str
    prompt: str
    raw: str
    box: Box | None = None
    reason: str | None = None
    place: tuple[int, int, int] | None = None
    boxes: tuple[Box, ...] = ()
    likelihoods: tuple[float, ...] = ()


@dataclass
class Evaluation:
    """One evaluation folder, read back: targets and predictions are joined, same length and order."""

    folder: Path
    run: dict[str, Any]
    targets: list[Target]
    predictions: list[Prediction]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.run["protocol"]

    @property
    def name(self) -> str:
        """`refcoco/testA`: what two runs must share to be compared."""
        return f"{self.protocol['benchmark']}/{self.protocol['split']}"


class PredictionLog:
    """Opens an evaluation folder for writing: new, or where an interrupted run of the same protocol and model stopped.

    Raises DataError when the folder holds predictions of another protocol, model or set of questions.
    """

    def __init__(
        self,
        folder: Path,
        protocol: dict[str, Any],
        model: dict[str, Any],
        targets: list[Target],
        settings: dict[str, Any],
    ):
        self.folder = Path(folder)
        self.targets, self.name = targets, f"{protocol['benchmark']}/{protocol['split']}"
        lines = [as_line(target) for target in targets]
        protocol = {**protocol, "n": len(targets), "targets_sha256": _sha256(lines)}
        run = {"protocol": protocol, "model": model, "launches": [launch_record(settings)]}
        self.cut_off = 0
        first_does(lambda: self._open(run, lines))
        own = "predictions.jsonl" if rank() == 0 else f"predictions.rank{rank()}.jsonl"
        self.path = self.folder / own
        self.answered = {prediction.id for prediction in read_predictions(self.folder / "predictions.jsonl")}
        wait_for_all()  # nobody adds answers before all have read what there was
        self.path.touch()

    def _open(self, run: dict, lines: list[str]) -> None:
        if (self.folder / "run.json").exists():
            run = self._resumed(run)
        elif (self.folder / "predictions.jsonl").exists():
            raise DataError(f"{self.folder} holds predictions without the run.json that says whose; remove that folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "targets.jsonl", "".join(line + "\n" for line in lines))
        write_whole(self.folder / "run.json", json.dumps(run, indent=1) + "\n")
        self._join()

    def _join(self) -> None:
        """Puts what other processes wrote into predictions.jsonl; what a kill left half-written is cut off and counted.

        An interruption here loses nothing: the parts go when the whole is there, and an id that is there already is skipped.
        """
        whole = self.folder / "predictions.jsonl"
        whole.touch()
        self.cut_off += drop_unfinished_line(whole)
        parts = sorted(self.folder.glob("predictions.rank*.jsonl"))
        if not parts:
            return
        self.cut_off += sum(map(drop_unfinished_line, parts))
        known = {prediction.id for prediction in read_predictions(whole)}
        added = [p for part in parts for p in read_predictions(part) if p.id not in known]
        write_whole(whole, whole.read_text() + "".join(as_line(prediction) + "\n" for prediction in added))
        for part in parts:
            part.unlink()

    def finish(self) -> None:
        """Waits for all processes and joins their answers."""
        wait_for_all()
        first_does(self._join)

    def _resumed(self, run: dict) -> dict:
        before = read_run(self.folder)
        for part in ("protocol", "model"):
            key = first_difference(before[part], json.loads(json.dumps(run[part])))
            if key is not None:
                raise DataError(
                    f"{self.folder} holds predictions with {part}.{key} {before[part].get(key)!r}, this run has "
                    f"{run[part].get(key)!r}; choose another --out, or remove that folder"
                )
        return {**run, "launches": before["launches"] + run["launches"]}

    def report_resumed(self) -> None:
        """Says on the terminal what an earlier run left here, if it left something."""
        if self.cut_off:
            print(f"{self.folder}: {self.cut_off} bytes of a half-written answer removed")
        if self.answered:
            print(f"{self.folder}: going on after {len(self.answered)} of {len(self.targets)} answers")

    def remaining(self) -> list[Target]:
        """The questions not answered yet, in order."""
        return [target for target in self.targets if target.id not in self.answered]

    def append(self, predictions: list[Prediction]) -> None:
        """Adds answers; they are on disk when this returns."""
        text = "".join(as_line(prediction) + "\n" for prediction in predictions)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            data = text.encode()
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        finally:
            os.close(file)
        self.answered.update(prediction.id for prediction in predictions)


# Left out of a line where they are empty: files of before these fields stay equal, to the hash.
OPTIONAL = {
    cls: {field.name for field in fields(cls) if field.default is not MISSING and field.default == ()}
    for cls in (Target, Prediction)
}
OPTIONAL[Target].add("region")


def as_line(row: Target | Prediction) -> str:
    """One JSON object; numbers that are not finite raise ValueError."""
    values = {key: value for key, value in asdict(row).items() if value not in ((), None) or key not in OPTIONAL[type(row)]}
    return json.dumps(values, allow_nan=False)


def load_evaluation(folder: Path) -> Evaluation:
    """Reads one folder and joins its predictions to its targets by id.

    Raises DataError for an id that is missing, doubled, unknown or of another picture, and for a line that cannot be read.
    """
    folder = Path(folder)
    run = read_run(folder)
    targets = [_target(row, where) for row, where in json_lines(folder / "targets.jsonl", AGAIN)]
    path = folder / "predictions.jsonl"
    by_id: dict[str, Prediction] = {}
    for prediction in read_predictions(path):
        if prediction.id in by_id:
            raise DataError(f"{path}: id {prediction.id} is answered twice; remove one of the two lines")
        by_id[prediction.id] = prediction
    known = {target.id for target in targets}
    unknown = next((id for id in by_id if id not in known), None)
    if unknown is not None:
        raise DataError(
            f"{path}: id {unknown} answers no question of targets.jsonl; these are predictions of another split or data set, "
            "remove the folder and evaluate again"
        )
    missing = [target.id for target in targets if target.id not in by_id]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(targets)} questions are not answered (the first is id {missing[0]}); "
            "run the evaluation again with the same --out to go on"
        )
    asked = run["protocol"].get("task") in ("grounding", "phrases")  # whose prompts hold the target's words
    for target in targets:
        answer = by_id[target.id]
        if answer.image != target.image:
            raise DataError(
                f"{path}: id {target.id} is answered about {answer.image}, the question is about {target.image}; "
                "these are predictions of another split or data set"
            )
        if asked and target.text not in answer.prompt:
            raise DataError(
                f"{path}: id {target.id} was asked '{answer.prompt[:60]}', the question is about '{target.text[:60]}'; "
                "these are predictions of another split or data set"
            )
    return Evaluation(folder, run, targets, [by_id[target.id] for target in targets])


def find_evaluations(run_folder: Path) -> list[Path]:
    """The evaluation folders inside a run folder, sorted. DataError when there are none."""
    found = sorted(path.parent for path in Path(run_folder).rglob("run.json"))
    if not found:
        raise DataError(f"{run_folder} holds no evaluation (no run.json below it); give the --out folder of an evaluation")
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """run.json as a dict with `protocol`, `model` and `launches`."""
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give the --out folder of an evaluation") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); remove the folder and evaluate again") from None
    missing = {"protocol", "model", "launches"} - run.keys()
    if missing:
        raise DataError(f"{path}: no key '{sorted(missing)[0]}'; remove the folder and evaluate again")
    return run


def read_predictions(path: Path) -> list[Prediction]:
    """All lines of a predictions file, in file order, not joined. DataError names the file and line that is broken."""
    predictions = []
    for row, where in json_lines(path, AGAIN):
        try:
            predictions.append(Prediction(**_tuples(row)))
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: not a prediction ({error}); remove that line") from None
    return predictions


def first_difference(a: dict, b: dict) -> str | None:
    """The first key whose values differ between two flat dicts, or that one of them lacks; None when they are equal."""
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in a or key not in b or a[key] != b[key]:
            return key
    return None


def drop_unfinished_line(path: Path) -> int:
    """Cuts what a kill left behind the last newline; returns the number of bytes removed."""
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep < len(data):
        os.truncate(path, keep)
    return len(data) - keep


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def launch_record(settings: dict[str, Any]) -> dict[str, Any]:
    """How this process was started: command, commit, time, versions, and settings that do not change an answer."""
    packages = {}
    for name in ("torch", "transformers", "open-cloc"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": source_commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version(), **packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **({"processes": world_size()} if world_size() > 1 else {}),
        **settings,
    }


def source_commit() -> str:
    """Commit of the code that runs, `+changes` where the tree differs from it; `unknown` outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"
    return commit + ("+changes" if changes.strip() else "")


def _target(row: dict, where: str) -> Target:
    try:
        return Target(**_tuples(row))
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not a question ({error}); remove the folder and evaluate again") from None


def _tuples(row: dict) -> dict:
    """JSON's lists as the tuples that they were."""
    return {key: tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value
            for key, value in row.items()}  # fmt: skip


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
