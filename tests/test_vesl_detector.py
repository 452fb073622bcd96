"""Detectors against the stock forward and post-processing of transformers, and their rule on scores that are written here."""

import pytest
import torch
from vesl_fixtures import OWL_SIZE, PATCH, noise_image, save_grounding_dino, save_owl

from encoder.boxes import box_iou
from encoder.errors import DataError
from encoder.vesl.detections import Detection, PhraseCache, best_detections
from encoder.vesl.detector import Detector
from encoder.vesl.grounding_dino import phrase_tokens

pytest.importorskip("scipy", reason="scipy, which OWLv2's own processor resizes with, is not installed (extra vesl)")

SIZES = [(60, 33), (33, 60), (48, 48)]
PHRASES = [["a red bus", "two dogs"], ["the heart"], ["umbrella", "a red bus", "apple of a tree"]]


@pytest.fixture(scope="module")
def images():
    return [noise_image(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def owl_folders(tmp_path_factory):
    return {kind: save_owl(tmp_path_factory.mktemp(kind), kind) for kind in ("owlv2", "owlvit")}


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return save_grounding_dino(tmp_path_factory.mktemp("dino"))


def as_rows(detections: list[Detection]) -> torch.Tensor:
    return torch.tensor([[*detection.box, detection.score] for detection in detections]).reshape(-1, 5)


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows[rows[:, 4].argsort(descending=True, stable=True)]


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
class TestOwl:
    def test_the_parts_equal_the_stock_forward(self, owl_folders, images, kind):
        """Logits and boxes of cached texts, images of several shapes and uneven lists of phrases, in value."""
        detector = Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE)
        scores = detector.scores
        with torch.no_grad():
            logits, boxes = scores.forward(scores.pixels(images), PHRASES)
            again, _ = scores.forward(scores.pixels(images), PHRASES)  # every text from memory
            inputs = scores.processor(text=PHRASES, images=images, return_tensors="pt")
            stock = scores.model(**inputs)
        torch.testing.assert_close(scores.pixels(images), inputs["pixel_values"], rtol=0, atol=0)
        for ours, theirs, of_image in zip(logits, stock.logits, PHRASES, strict=True):
            # Past the end of a shorter list the stock model scores an empty text; here nothing can be it.
            torch.testing.assert_close(ours[:, : len(of_image)], theirs[:, : len(of_image)], rtol=1e-4, atol=1e-5)
            assert (ours[:, len(of_image) :] < -1e30).all()
        torch.testing.assert_close(boxes, stock.pred_boxes, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits, again)

    def test_another_field_equals_stock_interpolation(self, owl_folders, images, kind):
        size = OWL_SIZE + 2 * PATCH
        scores = Detector.from_pretrained(owl_folders[kind], image_size=size).scores
        with torch.no_grad():
            logits, boxes = scores.forward(scores.pixels(images[:1]), PHRASES[:1])
            inputs = scores.processor(
                text=PHRASES[:1], images=images[:1], size={"height": size, "width": size}, return_tensors="pt"
            )
            stock = scores.model(**inputs, interpolate_pos_encoding=True)
        assert logits.shape[1] == (size // PATCH) ** 2 == 36
        torch.testing.assert_close(logits, stock.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes, stock.pred_boxes, rtol=1e-4, atol=1e-5)

    def test_detections_equal_the_stock_post_processing(self, owl_folders, images, kind):
        """On pictures that are not square: OWLv2's padding is undone, OWL-ViT's squash too."""
        detector = Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE, min_score=0.4)
        found = detector.detect(images, PHRASES)
        processor, model = detector.scores.processor, detector.scores.model
        assert 3 <= sum(map(len, found)) < 3 * 16
        for image, phrases, ours in zip(images, PHRASES, found, strict=True):
            inputs = processor(text=[phrases], images=[image], return_tensors="pt")
            with torch.no_grad():
                output = model(**inputs)
            size = [(image.height, image.width)]
            (theirs,) = processor.post_process_grounded_object_detection(output, 0.4, target_sizes=size, text_labels=[phrases])
            limit = torch.tensor([image.width, image.height] * 2)
            clipped = torch.minimum(theirs["boxes"].clamp(min=0), limit)
            inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])  # some lie in the padding alone
            order = theirs["scores"][inside].argsort(descending=True, stable=True)
            rows = torch.cat([clipped, theirs["scores"][:, None]], dim=1)[inside][order]
            labels = [theirs["text_labels"][index] for index in inside.nonzero()[:, 0][order]]
            torch.testing.assert_close(as_rows(ours), rows, rtol=1e-4, atol=1e-3)
            assert [detection.phrase for detection in ours] == labels

    def test_a_batch_equals_one_by_one_and_empty_lists_cost_nothing(self, owl_folders, images, kind, monkeypatch):
        detector = Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE, min_score=0.4)
        alone = [detector.detect([image], [phrases])[0] for image, phrases in zip(images, PHRASES, strict=True)]
        for one, batched in zip(alone, detector.detect(images, PHRASES), strict=True):
            torch.testing.assert_close(as_rows(one), as_rows(batched), rtol=1e-4, atol=1e-3)
        mixed = detector.detect([images[0], images[1], images[2]], [[], PHRASES[1], []])
        assert mixed[0] == mixed[2] == [] and as_rows(mixed[1]).allclose(as_rows(alone[1]), atol=1e-3)
        monkeypatch.setattr(detector.scores, "pixels", None)
        assert detector.detect(images, [[], [], []]) == [[], [], []] and detector.detect([], []) == []

    def test_templates_average_embeddings(self, owl_folders, images, kind):
        one, two = "{}", "a {} x"
        scores = [Detector.from_pretrained(owl_folders[kind], OWL_SIZE, templates=t).scores for t in [(one,), (two,), (one, two)]]
        with torch.no_grad():
            plain, framed, both = (s.embed_phrases(["bus"]) for s in scores)
            torch.testing.assert_close(both, (plain + framed) / 2)
            torch.testing.assert_close(framed, scores[0].embed_phrases(["a bus x"]))

    def test_an_embedding_follows_from_its_phrase_alone(self, owl_folders, kind):
        """To the last bit, whatever else was asked with it, before it and how often."""
        words = [f"thing {letter}" for letter in "abcdefghijklmnopq"]
        make = lambda: Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE).scores.embed_phrases  # noqa: E731
        together = make()(words)
        one = make()
        apart = torch.cat([one([word]) for word in reversed(words)]).flip(0)
        assert torch.equal(together, apart)

    def test_a_phrase_that_is_too_long_is_cut(self, owl_folders, images, kind):
        found = Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE, min_score=0).detect(images[:1], [["word " * 40]])
        assert len(found[0]) > 0

    def test_describe_and_wrong_fields(self, owl_folders, kind):
        described = Detector.from_pretrained(owl_folders[kind], image_size=OWL_SIZE, nms_iou=0.5).describe()
        assert described["detector"] == kind and len(described["weights"]) == 64 and described["nms_iou"] == 0.5
        with pytest.raises(DataError, match="image_size is 450, the detector's patches are 8 px; give a multiple, such as 448"):
            Detector.from_pretrained(owl_folders[kind], image_size=450)
        with pytest.raises(DataError, match="give texts with {} once in each"):
            Detector.from_pretrained(owl_folders[kind], templates=("a photo",))


def test_the_phrase_cache_embeds_each_phrase_once():
    asked = []

    def embed(phrases):
        asked.append(list(phrases))
        return torch.tensor([[float(len(phrase))] for phrase in phrases])

    cache = PhraseCache(embed, size=2, max_phrases=4)
    assert cache(["a", "bb", "a", "ccc"])[:, 0].tolist() == [1, 2, 1, 3]
    assert asked == [["a", "bb"], ["ccc", "ccc"]]
    assert cache(["bb", "dddd"])[:, 0].tolist() == [2, 4] and asked[2:] == [["dddd", "dddd"]]
    assert cache(["bb", "eeeee"])[:, 0].tolist() == [2, 5] and asked[3:] == [["bb", "eeeee"]]  # full: afresh


class TestGroundingDino:
    def test_scores_and_boxes_equal_the_stock_forward(self, dino_folder, images):
        detector = Detector.from_pretrained(dino_folder, image_size=96, min_score=0.0)
        found = detector.detect(images, PHRASES)
        processor, model = detector.scores.processor, detector.scores.model
        size = {"shortest_edge": 96, "longest_edge": 96}
        inputs = processor(text=PHRASES, images=images, size=size, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        words = [set(processor.tokenizer(" ".join(p), add_special_tokens=False).input_ids) for p in PHRASES]
        for index, image in enumerate(images):
            stock = processor.post_process_grounded_object_detection(
                output, threshold=-1, target_sizes=[(i.height, i.width) for i in images]
            )[index]
            # The published confidence is the maximum over all tokens, ours over those of phrases.
            of_phrases = torch.tensor([token in words[index] for token in inputs["input_ids"][index].tolist()])
            scores = output.logits[index, :, : len(of_phrases)].sigmoid()[:, of_phrases].max(1).values
            limit = torch.tensor([image.width, image.height] * 2)
            rows = torch.cat([torch.minimum(stock["boxes"].clamp(min=0), limit), scores[:, None]], dim=1)
            assert len(found[index]) == 12
            torch.testing.assert_close(as_rows(found[index]), sorted_rows(rows), rtol=1e-4, atol=1e-3)

    def test_a_phrase_scores_its_best_token(self, dino_folder, images, monkeypatch):
        """Logits written here: token by token, which phrase is right is known."""
        detector = Detector.from_pretrained(dino_folder, image_size=96, min_score=0.1)
        tokens = ["[CLS]", "a", "red", "bus", ".", "two", "dog", "##s", ".", "[SEP]"]
        probs = torch.full((1, 4, 64), 1e-3)
        probs[0, 0, 3], probs[0, 0, 5] = 0.8, 0.3  # bus, two
        probs[0, 1, 7], probs[0, 1, 1] = 0.6, 0.5  # ##s, a
        probs[0, 2, 0] = probs[0, 2, 4] = probs[0, 2, 9] = probs[0, 2, 8] = 0.9  # only tokens of no phrase
        probs[0, 3, 2] = 0.1  # not above
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1], [0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1]]])
        stock = detector.scores.model.forward

        def forward(**inputs):
            assert detector.scores.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == tokens
            output = stock(**inputs)
            output.logits, output.pred_boxes = probs.logit(), boxes
            return output

        monkeypatch.setattr(detector.scores.model, "forward", forward)
        (found,) = detector.detect([images[0]], [["a red bus", "Two Dogs"]])
        width, height = images[0].size
        assert [detection.phrase for detection in found] == ["a red bus", "Two Dogs"]
        assert [detection.score for detection in found] == pytest.approx([0.8, 0.6])
        assert found[0].box == pytest.approx((width / 4, height / 4, 3 * width / 4, 3 * height / 4))
        assert found[1].box == pytest.approx((0, 0, width / 2, height))

    def test_many_phrases_go_into_several_sentences(self, dino_folder, images):
        detector = Detector.from_pretrained(dino_folder, image_size=96, min_score=0.0)
        many = [f"thing {letter} of {other}" for letter in "abcd" for other in "abc"]  # 9 tokens each; 62 fit
        parts = detector.scores._sentences(many)
        assert sum(parts, []) == list(range(12)) and all(len(part) == 6 for part in parts)
        found = detector.detect([images[0], images[1]], [many, ["a red bus"]])
        assert len(found[0]) == 24 and len(found[1]) == 12
        assert {detection.phrase for detection in found[0]} <= set(many)
        # The first sentence asked for alone, on pictures padded alike, gives the same boxes and scores.
        first, _ = detector.detect([images[0], images[1]], [many[:6], ["a red bus"]])
        apart = torch.cdist(as_rows(first), as_rows(found[0]), p=float("inf")).amin(1)
        assert len(first) == 12 and apart.max() < 1e-2

    def test_the_models_own_marks_in_a_phrase_do_not_part_it(self, dino_folder, images):
        detector = Detector.from_pretrained(dino_folder, image_size=96, min_score=0.0)
        (found,) = detector.detect([images[0]], [["st. bus?", ".", "dog"]])
        assert {detection.phrase for detection in found} <= {"st. bus?", "dog"} and len(found) == 12

    def test_templates_are_refused(self, dino_folder):
        with pytest.raises(DataError, match="Grounding DINO reads phrases as they are"):
            Detector.from_pretrained(dino_folder, templates=("a photo of {}",))


def test_phrase_tokens_by_characters():
    offsets = torch.tensor([[0, 0], [0, 1], [2, 5], [5, 6], [7, 9], [9, 10], [0, 0]])  # "a red. dog" + "."
    assert phrase_tokens([5, 2], offsets, 8).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]


class TestRule:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [5, 5, 5, 9], [0, 0, 10, 10.5]]).float()
    scores = torch.tensor([[0.5, 0.2], [0.3, 0.7], [0.1, 0.05], [0.9, 0.9], [0.4, 0.4]])

    def test_best_phrase_above_the_threshold_best_first(self):
        found = best_detections(self.boxes, self.scores, ["bus", "dog"], 0.1)
        assert found == [
            Detection((1, 0, 11, 10), "dog", pytest.approx(0.7)),
            Detection((0, 0, 10, 10), "bus", 0.5),
            Detection((0, 0, 10, 10.5), "bus", pytest.approx(0.4)),  # the first named of two equal phrases
        ]  # 0.1 is not above 0.1, and the fourth has no area
        assert best_detections(self.boxes, self.scores[:, :0], [], 0.1) == []

    def test_suppression_is_greedy_over_all_phrases(self):
        found = best_detections(self.boxes, self.scores, ["bus", "dog"], 0.05, nms_iou=0.5)
        assert [detection.box[0] for detection in found] == [1, 20]

    def test_suppression_equals_the_definition_on_random_boxes(self):
        generator = torch.Generator().manual_seed(0)
        corners = torch.rand(200, 2, 2, generator=generator).sort(dim=1).values.reshape(200, 4) * 100
        scores = torch.rand(200, 1, generator=generator)
        found = best_detections(corners, scores, ["x"], 0.0, nms_iou=0.3)
        kept = []
        for index in scores[:, 0].argsort(descending=True).tolist():  # by its definition, box by box
            if all(box_iou(corners[index][None], corners[other][None]).item() <= 0.3 for other in kept):
                kept.append(index)
        assert [detection.box for detection in found] == [tuple(corners[index].tolist()) for index in kept] and 5 < len(
            kept
        ) < 150

    def test_wrong_rules_are_one_sentence(self):
        with pytest.raises(DataError, match="min_score is 1.5; give a score below 1"):
            Detector(None, min_score=1.5)
        with pytest.raises(DataError, match="nms_iou is 0; give an overlap above 0"):
            Detector(None, nms_iou=0)
        with pytest.raises(DataError, match="2 images came with 1 lists of phrases"):
            Detector(None).detect([None, None], [["a"]])


def test_a_folder_of_something_else_is_one_sentence(tmp_path, tiny_folder):
    with pytest.raises(
        DataError, match="holds a 'cloc' model; give a detector of one of the kinds owlv2, owlvit, grounding-dino"
    ):
        Detector.from_pretrained(tiny_folder)
    with pytest.raises(DataError, match="holds no model that transformers can read"):
        Detector.from_pretrained(tmp_path)
