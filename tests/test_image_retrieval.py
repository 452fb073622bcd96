"""Image-text retrieval on Karpathy's JSON for COCO and Flickr30k: recall against loops, and two runs set side by side."""

import json

import numpy as np
import pytest
import torch
from eval_fixtures import naive_recall, run, save_stock_clip, write_json, write_picture
from PIL import Image

from encoder.errors import DataError
from encoder.pretrained import load_encoder, load_processor
from eval import compare, image_retrieval
from eval.image_retrieval import completeness
from eval.predictions import load_evaluation

CAPTIONS = [
    ["a red square ", "small red square"],
    ["a blue dot", "two dots", "blue", "a dot", "a small blue dot", "the sixth is not read"],
    ["a red square", "green tower"],  # the first is also said of the first picture
]


@pytest.fixture
def karpathy(tmp_path):
    """Three pictures of split test and one of restval, in the form of dataset_coco.json."""
    images = []
    for number, captions in enumerate([*CAPTIONS, ["never read"]]):
        name, split = f"COCO_val2014_{number:012d}.jpg", "test" if number < 3 else "restval"
        write_picture(tmp_path / "images/val2014" / name, 40 + 8 * number, 36, number)
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 10 * number + i} for i, text in enumerate(captions)
        ]
        images.append({
            "filepath": "val2014", "filename": name, "split": split, "imgid": number, "cocoid": 100 + number,
            "sentids": [row["sentid"] for row in sentences], "sentences": sentences,
        })  # fmt: skip
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return tmp_path


def evaluate(model, folder, out, *arguments):
    common = ["--annotations", folder / "dataset_coco.json", "--images", folder / "images"]
    run(image_retrieval, "--model", model, *common, "--out", folder / out, *arguments)


def test_recall_equals_loops_whatever_the_batch(tiny_folder, karpathy):
    evaluate(tiny_folder, karpathy, "run", "--batch-size", 2)
    by_text, by_image = (load_evaluation(karpathy / f"run/{name}/coco-test") for name in ("text_to_image", "image_to_text"))
    captions = [text.strip() for texts in CAPTIONS for text in texts[:5]]
    assert [target.text for target in by_text.targets] == captions
    assert by_text.protocol["captions_per_picture"] == 5 and by_text.protocol["candidates"] == 3
    assert by_text.protocol["completeness"] == "PARTIAL: the file has 3 of 5000 pictures"

    model, processor = load_encoder(tiny_folder), load_processor(tiny_folder)
    images = [Image.open(karpathy / "images" / target.image) for target in by_image.targets]
    with torch.no_grad():
        pictures = torch.cat([model.encode_image(**processor.images([image])[0]).feat for image in images])
        unique = {text: model.encode_text(**processor.texts([text]))[0] for text in dict.fromkeys(captions)}
    texts = torch.stack([unique[text] for text in captions])
    unit = [torch.nn.functional.normalize(rows.double(), dim=-1).numpy() for rows in (texts, pictures)]
    similarity = unit[0] @ unit[1].T
    owner = [number for number, texts in enumerate(CAPTIONS) for _ in texts[:5]]
    right = ([{number} for number in owner], [{t for t, n in enumerate(owner) if n == number} for number in range(3)])
    for evaluation, matrix, rights in zip((by_text, by_image), (similarity, similarity.T), right, strict=True):
        gaps = np.diff(np.sort(matrix, axis=1), axis=1)
        assert gaps[gaps > 0].min() > 1e-6  # else rounding could decide
        scores = json.loads((evaluation.folder / "scores.json").read_text())
        for k in (1, 5, 10):
            # The reference draws its orders at random, so a tie is met to a few percent.
            assert scores[f"recall_{k}"]["value"] == pytest.approx(naive_recall(matrix, rights, k), abs=0.03)
            assert 0 < scores["chances"][f"recall_{k}"] <= 1


def test_two_models_are_compared_with_pictures(tiny_folder, karpathy, capsys):
    clip = save_stock_clip(tiny_folder, karpathy / "clip")
    evaluate(tiny_folder, karpathy, "cloc")
    evaluate(clip, karpathy, "stock", "--geometry", "center_crop")
    arguments = [f"cloc={karpathy / 'cloc'}", f"clip={karpathy / 'stock'}", "--out", karpathy / "report", "--examples", 2]
    run(compare, *arguments)
    report = (karpathy / "report/report.html").read_text()
    assert "text_to_image" in report and "R@10" in report
    rows = json.loads((karpathy / "report/report.json").read_text())["rows"]
    chances = {(row["name"], row["metric"]): row["chance"] for row in rows}
    assert chances["text_to_image/coco-test", "recall_1"] == pytest.approx(1 / 3)
    assert chances["text_to_image/coco-test", "recall_5"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[0].pop("sentences"), r"images\[0\] is not as in Karpathy's splits .KeyError"),
        (lambda images: images[1].update(sentences=[]), r"images\[1\] has no sentence"),
        (lambda images: images[1].update(filename="gone.jpg"), "val2014/gone.jpg cannot be read"),
        (lambda images: [image.update(split="train") for image in images], "no picture has split 'test'; there are train"),
    ],
)
def test_bad_files_get_one_sentence(tiny_folder, karpathy, change, message):
    content = json.loads((karpathy / "dataset_coco.json").read_text())
    change(content["images"])
    write_json(karpathy / "dataset_coco.json", content)
    with pytest.raises(DataError, match=message):
        evaluate(tiny_folder, karpathy, "run")


def test_published_counts(tmp_path):
    flickr = tmp_path / "dataset_flickr30k.json"
    assert completeness(flickr, "test", 1000, 1000) == "published"
    assert completeness(flickr, "test", 1000, 10) == "PARTIAL: 10 of 1000 pictures"
    assert completeness(tmp_path / "mine.json", "test", 3, 3) == "own data"
