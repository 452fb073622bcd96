"""lmms-eval's own command, from the entry point to the metric: its GQA task, and a multiple choice, on scenes in a folder."""

import importlib.util
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from encoder.data.pictures import load_library
from encoder.data.scenes import PictureLibrary, SceneConfig, draw_scene
from mllm import GroundingChat
from mllm.likelihood import answer_likelihoods

ROOT = Path(__file__).parents[1]
MLLM = ROOT / "weights" / "mllm_cloc"
PACKAGE = importlib.util.find_spec("lmms_eval")
SCENES = 6
TASKS = ("scenes_gqa", "scenes_choice")
pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="lmms-eval is not installed; docs/evaluation.md says how"),
    pytest.mark.timeout(1800),  # its imports alone take a minute on a busy machine
]


@pytest.fixture(scope="module")
def chat():
    return GroundingChat.from_pretrained(MLLM)


@pytest.fixture(scope="module")
def docs(chat, tmp_path_factory):
    """Documents of a task, and the folder with their pictures and `metadata.jsonl`, as Hugging Face's imagefolder reads it."""
    library = PictureLibrary(load_library("base", seed=0)[0])
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "test").mkdir()
    found, pictures = [], []
    for index in range(SCENES):
        scene = draw_scene(SceneConfig(), library, seed=6, index=index, split="lmms")
        scene.image.save(folder / "test" / f"{index}.png")
        pictures.append(scene.image)
        thing, other = scene.objects[0], next(each for each in scene.objects if each.name != scene.objects[0].name)
        question = chat.model.question_text(scene.image, "What is <region:0>?", [thing.box])
        choices = [thing.name, other.name][:: -1 if index == 0 else 1]  # one answer is wrong, for a score that is not 1
        found.append({"file_name": f"{index}.png", "question": question, "answer": choices[0], "choices": choices})
    (folder / "test" / "metadata.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in found))
    return folder, found, pictures


@pytest.fixture(scope="module")
def results(docs, tmp_path_factory):
    """What the command wrote: task -> scores, and task -> a sample per document."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {
        "dataset_path": "imagefolder",
        "dataset_name": None,
        "dataset_kwargs": {"data_dir": str(docs[0])},
        "test_split": "test",
    }
    gqa = {"include": str(Path(PACKAGE.origin).parent / "tasks/gqa/gqa.yaml"), "task": "scenes_gqa", "process_docs": None}
    gqa |= {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}}}
    (folder / "scenes_gqa.yaml").write_text(yaml.safe_dump(gqa | data))
    choice = {"task": "scenes_choice", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "answer"}
    choice |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (folder / "scenes_choice.yaml").write_text(yaml.safe_dump(choice | data) + "doc_to_visual: !function utils.pictures\n")
    (folder / "utils.py").write_text("def pictures(doc):\n    return [doc['image']]\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "open_cloc", "--model_args", f"pretrained={MLLM}"]
    command += ["--batch_size", "4", "--tasks", ",".join(TASKS), "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True)
    written = list((folder / "out").rglob("*_results.json"))
    assert done.returncode == 0 and len(written) == 1, (done.stdout + done.stderr)[-4000:]  # it ends with 0 after an error too
    samples = {}
    for task in TASKS:
        lines = next((folder / "out").rglob(f"*samples_{task}.jsonl")).read_text().splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda row: row["doc_id"])
    return json.loads(written[0].read_text())["results"], samples


def plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def test_gqas_task_scores_the_chats_answers(chat, docs, results):
    _, found, pictures = docs
    scores, samples = results
    said = [chat.ask(image, doc["question"], max_new_tokens=16).text for image, doc in zip(pictures, found, strict=True)]
    assert [row["filtered_resps"] for row in samples["scenes_gqa"]] == said
    right = sum(plain(text) == plain(doc["answer"]) for text, doc in zip(said, found, strict=True))
    assert 0 < right < SCENES and scores["scenes_gqa"]["exact_match,none"] == pytest.approx(right / SCENES)


def test_a_multiple_choice_takes_the_likelier_answer(chat, docs, results):
    _, found, pictures = docs
    scores, samples = results
    rows = [(image, doc["question"], [], choice) for image, doc in zip(pictures, found, strict=True) for choice in doc["choices"]]
    expected = answer_likelihoods(chat.model, rows)
    got = [-float(loss) for row in samples["scenes_choice"] for loss, _ in row["filtered_resps"]]
    assert got == pytest.approx(expected, rel=1e-4)
    right = sum(first > second for first, second in zip(expected[::2], expected[1::2], strict=True))
    assert 0 < right < SCENES and scores["scenes_choice"]["acc,none"] == pytest.approx(right / SCENES)
