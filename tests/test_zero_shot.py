"""Zero-shot classification of folders: forms of the names, top-1 and top-5 against loops, equal names, going on."""

import json

import pytest
import torch
from eval_fixtures import run, save_stock_clip, write_json, write_picture
from PIL import Image

from encoder.errors import DataError
from encoder.pretrained import load_encoder, load_processor
from eval import zero_shot
from eval.class_folders import read_class_folders
from eval.predictions import load_evaluation

FOLDERS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331", "n01498041"]
NAMES = ["red square", "green bar", "blue tower", "yellow dot", "red dot", "green square", "blue bar"]


@pytest.fixture
def imagenet(tmp_path):
    """Seven classes, two pictures each."""
    for number, folder in enumerate(FOLDERS):
        for place in range(2):
            path = tmp_path / "val" / folder / f"ILSVRC2012_val_{number}{place}.JPEG"
            write_picture(path, 30 + number, 40 - 5 * place, 2 * number + place)
    write_json(tmp_path / "names.json", dict(zip(FOLDERS, NAMES, strict=True)))
    return tmp_path


def evaluate(model, folder, *arguments):
    run(zero_shot, "--model", model, "--images", folder / "val", "--out", folder / "run", *arguments)
    return load_evaluation(folder / "run/zero_shot/val")


def scores(folder):
    return json.loads((folder / "run/zero_shot/val/scores.json").read_text())


@pytest.mark.parametrize("kind", ["cloc", "clip"])
def test_top_1_and_top_5_equal_loops_over_single_pictures(tiny_folder, imagenet, kind, capsys):
    folder = tiny_folder if kind == "cloc" else save_stock_clip(tiny_folder, imagenet / "clip")
    templates = ("a photo of a {}.", "{}")
    evaluation = evaluate(folder, imagenet, "--names", imagenet / "names.json", "--templates", templates[0], "--batch-size", 3)
    assert capsys.readouterr().out.strip().endswith(f"answers and scores: {imagenet / 'run/zero_shot/val'}")
    assert evaluation.protocol["candidates"] == 7 and len(evaluation.targets) == 14

    model, processor = load_encoder(folder), load_processor(folder)
    first = fifth = 0
    with torch.no_grad():
        texts = [model.get_text_features(**processor.texts([f"a photo of a {name}."])).pooler_output[0] for name in NAMES]
        for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
            inputs, _ = processor.images([Image.open(imagenet / "val" / target.image)])
            image = model.get_image_features(**inputs).pooler_output[0]
            cosines = [float(torch.cosine_similarity(image.double(), text.double(), dim=0)) for text in texts]
            order = sorted(range(7), key=lambda k: -cosines[k])
            place = order.index(FOLDERS.index(target.category))
            assert prediction.place == (place, 0, 1)
            assert prediction.raw == NAMES[order[0]]
            first, fifth = first + (place == 0), fifth + (place < 5)
    assert scores(imagenet)["top_1"]["value"] == pytest.approx(first / 14)
    assert scores(imagenet)["top_5"]["value"] == pytest.approx(fifth / 14)
    assert scores(imagenet)["chances"] == pytest.approx({"top_1": 1 / 7, "top_5": 5 / 7})


def test_classes_of_one_name_share_their_hits(tiny_folder, imagenet):
    names = ["red dot", *["missile"] * 6]  # a list, in the order of the sorted folders
    write_json(imagenet / "names.json", names)
    evaluation = evaluate(tiny_folder, imagenet, "--names", imagenet / "names.json", "--templates", "name")
    for target, prediction in zip(evaluation.targets, evaluation.predictions, strict=True):
        alone = target.category == FOLDERS[0]
        assert prediction.place[1:] == (0 if alone else 5, 1)
        assert prediction.place[0] in ((0, 6) if alone else (0, 1))


def test_a_cut_run_goes_on_and_a_limit_is_said(tiny_folder, imagenet, capsys, monkeypatch):
    arguments = ["--names", imagenet / "names.json", "--templates", "name", "--limit", 9, "--batch-size", 4]
    evaluation = evaluate(tiny_folder, imagenet, *arguments)
    assert evaluation.protocol["completeness"] == "PARTIAL: 9 of 14"
    assert len({target.category for target in evaluation.targets}) > 4  # drawn over the classes
    path = imagenet / "run/zero_shot/val/predictions.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    evaluate(tiny_folder, imagenet, *arguments)
    assert "going on after 4 of 9" in capsys.readouterr().out and path.read_text() == whole
    with pytest.raises(DataError, match="--limit is 0; give at least 1"):
        evaluate(tiny_folder, imagenet, *arguments, "--limit", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="evaluations of an encoder run in one process"):
        evaluate(tiny_folder, imagenet, *arguments)


def test_forms_of_the_names(imagenet):
    read = lambda file: read_class_folders(imagenet / "val", file).names  # noqa: E731
    index = {str(i): [folder, name] for i, (folder, name) in enumerate(zip(FOLDERS, NAMES, strict=True))}
    assert read(write_json(imagenet / "imagenet_class_index.json", index)) == NAMES
    lines = "".join(f"{folder} {name}, Tinca tinca\n" for folder, name in zip(FOLDERS, NAMES, strict=True))
    (imagenet / "LOC_synset_mapping.txt").write_text(lines)
    assert read(imagenet / "LOC_synset_mapping.txt") == NAMES
    (imagenet / "val/n01440764").rename(imagenet / "val/apple_pie")
    assert read(None)[0] == "apple pie"
    with pytest.raises(DataError, match="no name for 1 of 7 folders, the first is apple_pie"):
        read(imagenet / "names.json")
    with pytest.raises(DataError, match="a list of 2, there are 7 folders"):
        read(write_json(imagenet / "short.json", ["a", "b"]))


def test_folders_that_are_numbers_are_in_their_order(tmp_path):
    """ImageNet-V2's: a list of names, and imagenet_class_index.json, whose keys they are."""
    for number in (0, 1, 2, 9, 10, 11, 100):
        write_picture(tmp_path / f"v2/{number}/a.jpeg", 30, 40, number)
    names = [f"name {number}" for number in (0, 1, 2, 9, 10, 11, 100)]
    classes = read_class_folders(tmp_path / "v2", write_json(tmp_path / "list.json", names))
    assert classes.folders == ["0", "1", "2", "9", "10", "11", "100"] and classes.names == names
    assert [(path, classes.names[index]) for path, index in classes.images][4] == ("10/a.jpeg", "name 10")
    index = {str(number): [f"n{number:08d}", f"name {number}"] for number in range(101)}
    assert read_class_folders(tmp_path / "v2", write_json(tmp_path / "index.json", index)).names == names


def test_bad_folders_get_one_sentence(tiny_folder, imagenet, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        run(zero_shot, "--model", tiny_folder, "--images", imagenet / "gone", "--out", imagenet / "run")
    (imagenet / "val/n01440764/notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes.txt is not one of .bmp, .jpeg"):
        evaluate(tiny_folder, imagenet)
    (imagenet / "val/n01440764/notes.txt").rename(imagenet / "val/n01440764/broken.JPEG")
    with pytest.raises(DataError, match="broken.JPEG cannot be read as an image"):
        evaluate(tiny_folder, imagenet)
    (imagenet / "val/empty").mkdir()
    with pytest.raises(DataError, match="empty holds no picture"):
        evaluate(tiny_folder, imagenet)
