"""CLOC as detector: against `RegionPredictor`, which embeds one image at a time, and with heads whose answer is known."""

import pytest
import torch
from transformers import CLIPModel

from encoder.boxes import box_iou
from encoder.errors import DataError
from encoder.model import ClocModel
from encoder.predictor import RegionPredictor
from encoder.vesl import cloc_detector
from encoder.vesl.cloc_detector import ClocDetector, windows


@pytest.fixture(scope="module")
def pictures(painted):
    return [painted(index)[0] for index in (0, 3, 7)]


PHRASES = [["red square", "small blue dot", "a picture"], ["green tower"], ["yellow bar", "red square"]]


def spread_out(model):
    """Boxes all over the square, so that the rule has something to choose from."""
    with torch.no_grad():
        torch.manual_seed(2)
        model.box_head.fc2.weight.normal_(std=0.3)
    return model


def test_boxes_and_scores_are_the_predictors(tiny_model, tiny_processor, pictures):
    """A box by `ground`, and the cosines of its region embedding with every phrase: batched here, one by one there."""
    model = spread_out(tiny_model)
    detector = ClocDetector(model, tiny_processor, min_score=-1, nms_iou=None)
    predictor = RegionPredictor(model, tiny_processor)
    for picture, phrases, found in zip(pictures, PHRASES, detector.detect(pictures, PHRASES), strict=True):
        predictor.set_image(picture)
        boxes, scores = predictor.ground(phrases)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) > 0
        index, cosines = predictor.classify_boxes(boxes[area], phrases)
        expected = {
            tuple(round(value, 2) for value in box.tolist()): (phrases[best], cosine.max().item())
            for box, best, cosine in zip(boxes[area], index.tolist(), cosines, strict=True)
        }
        assert len(found) == len(expected) > 0
        for detection in found:
            phrase, score = expected[tuple(round(value, 2) for value in detection.box)]
            assert detection.phrase == phrase and detection.score == pytest.approx(score, abs=1e-4)
        assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)


def test_what_lies_in_a_box_names_it(tiny_model, tiny_processor, pictures, monkeypatch):
    """Both prompts find one box, whose embedding is that of the second phrase: one detection is left, with its name."""
    detector = ClocDetector(tiny_model, tiny_processor, min_score=0.5)
    _, second = detector.embed_phrases(["red square", "green tower"])
    monkeypatch.setattr(tiny_model, "predict_boxes", lambda feat: torch.tensor([[0.6, 0.7, 0.2, 0.3]]).expand(len(feat), 4))
    monkeypatch.setattr(tiny_model, "embed_boxes", lambda tokens, boxes, index: 3 * second.expand(len(boxes), -1))
    ((found,),) = detector.detect(pictures[:1], [["red square", "green tower"]])
    assert found.phrase == "green tower" and found.score == pytest.approx(1, abs=1e-5)
    width, height = pictures[0].size
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2  # the padding, centred; the crossed corners were put in order
    expected = torch.tensor([0.2 * side - left, 0.3 * side - top, 0.6 * side - left, 0.7 * side - top])
    assert (torch.tensor(found.box) - expected).abs().max() < side / 32  # padding is whole pixels of the 32 px input
    monkeypatch.setattr(tiny_model, "embed_boxes", lambda tokens, boxes, index: -second.expand(len(boxes), -1))
    assert detector.detect(pictures[:1], [["green tower"]]) == [[]]


def test_windows_are_scored_as_the_predictor_scores_boxes(tiny_model, tiny_processor, pictures, monkeypatch):
    monkeypatch.setattr(cloc_detector, "PROMPTS_AT_ONCE", 100)  # several parts, which do not end with an image
    detector = ClocDetector(tiny_model, tiny_processor, min_score=-1, nms_iou=0.6, proposals="windows")
    predictor = RegionPredictor(tiny_model, tiny_processor)
    for picture, phrases, found in zip(pictures, PHRASES, detector.detect(pictures, PHRASES), strict=True):
        predictor.set_image(picture)
        boxes = torch.tensor([detection.box for detection in found])
        index, cosines = predictor.classify_boxes(boxes, phrases)
        assert [detection.phrase for detection in found] == [phrases[best] for best in index.tolist()]
        torch.testing.assert_close(torch.tensor([d.score for d in found]), cosines.amax(1), rtol=0, atol=1e-4)
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert len(found) > 20 and overlap.max() <= 0.6


def test_windows_leave_no_object_out():
    """A box of any place, a quarter of the square or larger and at most twice as long as wide, has a window of IoU 0.5."""
    boxes, generator = windows(), torch.Generator().manual_seed(0)
    assert boxes.min() >= 0 and boxes.max() <= 1 and len(boxes) < 1000
    size = 0.25 + 0.75 * torch.rand(2000, 2, generator=generator)
    size = size[size.amax(1) <= 2 * size.amin(1)]
    corner = torch.rand(len(size), 2, generator=generator) * (1 - size)
    assert box_iou(torch.cat([corner, corner + size], dim=1), boxes).amax(1).min() > 0.5


def test_from_a_folder_and_without_phrases(tiny_folder, pictures):
    detector = ClocDetector.from_pretrained(tiny_folder, min_score=0)
    assert detector.detect(pictures, [[], [], []]) == [[], [], []]
    described = detector.describe()
    assert described["detector"] == "cloc" and described["image_size"] == 32 and len(described["weights"]) == 64


def test_models_without_a_box_head_are_one_sentence(tiny_model, tiny_processor):
    config = tiny_model.config.to_dict() | {"region_encoder": "roi_align"}
    with pytest.raises(DataError, match="is a ClocModel that finds no boxes; give a CLOC with a Prompter"):
        ClocDetector(ClocModel(type(tiny_model.config)(**config)), tiny_processor)
    with pytest.raises(DataError, match="proposals is 'grid'; choose one of text, windows"):
        ClocDetector(tiny_model, tiny_processor, proposals="grid")
    with pytest.raises(DataError, match="some/clip is a CLIPModel that finds no boxes"):
        ClocDetector(CLIPModel(tiny_model.config), tiny_processor, checkpoint="some/clip")
