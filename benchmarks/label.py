"""Labelling images a second: the pipeline against plain loops over the same models, an image at a time.

    python benchmarks/label.py
    python benchmarks/label.py --captioner Salesforce/blip-image-captioning-base --detector google/owlv2-base-patch16-ensemble

`plain` captions an image, then asks the detector for one phrase after the other, as transformers' own pipeline does.
`one pass` asks for all phrases of the image together. `pipeline` is what label_regions.py runs: batches, decoding ahead, a
phrase's embedding kept, results and shards written. Captions and boxes must be the same in all three.

Without names the models are small ones drawn at random. What they write says nothing, so the alt-text takes the place of a
caption once that is made: sentences whose things are drawn by Zipf's law, as things are in captions.
"""

import argparse
import io
import shutil
import string
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import Bar, in_turn, report_of, show
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from encoder.errors import DataError, run_main
from encoder.vesl.captioner import Captioner
from encoder.vesl.detector import Detector
from encoder.vesl.inputs import open_input
from encoder.vesl.phrases import Phrases
from encoder.vesl.pipeline import label
from encoder.vesl.stage_files import LabelFolder
from encoder.vesl.stages import LabelJob, Part
from encoder.vesl.statistics import labelled_records

BARS = [Bar("plain", "pipeline", 2, at_least=True), Bar("one pass", "pipeline", 1, at_least=True)]
COLOURS = "red blue green yellow white black old small large wooden".split()
THINGS = (
    "man woman car dog cat tree table chair window street house bus train bird horse boat plate cup bottle book phone "
    "bicycle clock lamp flower bridge sign bench ball hat shirt shoe bag umbrella kite cake pizza apple banana sheep"
).split()
MIN_SCORE = 0.1
TEXT_LENGTH = 32  # tokens of the small OWLv2's phrases, one a letter


def make_models(folder: Path) -> tuple[str, str]:
    """Folders of a small BLIP and a small OWLv2, drawn at random."""
    letters = [*string.ascii_lowercase, ".", ","]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    bert = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {"vocab_size": len(words), "max_position_embeddings": 64, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3,
            "pad_token_id": 0, "encoder_hidden_size": 128}  # fmt: skip
    blip = BlipConfig(text_config={**tower, **text}, vision_config={**tower, "image_size": 224, "patch_size": 16})
    torch.manual_seed(0)
    BlipForConditionalGeneration(blip).save_pretrained(folder / "blip")
    BlipProcessor(BlipImageProcessorPil(size={"height": 224, "width": 224}), bert).save_pretrained(folder / "blip")

    words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], pad_token="!", model_max_length=TEXT_LENGTH
    )
    text = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": 0,
            "max_position_embeddings": TEXT_LENGTH}  # fmt: skip
    owl = Owlv2Config(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 448, "patch_size": 32},
        projection_dim=tower["hidden_size"],
    )
    model = Owlv2ForObjectDetection(owl)
    with torch.no_grad():
        for head in (model.class_head, model.box_head):
            for parameter in head.parameters():
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "owl")
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 448, "width": 448}), clip).save_pretrained(folder / "owl")
    return str(folder / "blip"), str(folder / "owl")


def write_images(path: Path, count: int) -> None:
    """A shard of noise of 480 x 360 pixels with sentences of eight things."""
    draw = np.random.default_rng(0)
    share = 1 / np.arange(1, len(THINGS) + 1)
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            things = draw.choice(THINGS, 8, p=share / share.sum())
            sentence = ", ".join(f"a {draw.choice(COLOURS)} {thing}" for thing in things)
            pixels = io.BytesIO()
            noise = Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            noise.resize((480, 360), Image.Resampling.BICUBIC).save(pixels, "JPEG")
            for suffix, data in (("jpg", pixels.getvalue()), ("txt", f"there is {sentence}".encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class AltTextAfterwards:
    """The captioner does its work, and the alt-text is what it is taken to have said."""

    def __init__(self, captioner: Captioner):
        self.captioner, self.said = captioner, []

    def caption(self, images: list[Image.Image], alt_texts: list[str]) -> list[str]:
        self.said += self.captioner.caption(images, alt_texts)
        return alt_texts

    def describe(self) -> dict:
        return self.captioner.describe()


class PlainDetector:
    """The stock model, one image at a time, and one phrase at a time or all of them; an image's boxes with their best phrases."""

    def __init__(self, path: str, at_once: bool):
        self.model = AutoModelForZeroShotObjectDetection.from_pretrained(path).eval()
        self.processor, self.at_once = AutoProcessor.from_pretrained(path), at_once

    @torch.inference_mode()
    def __call__(self, image: Image.Image, phrases: list[str]) -> list[tuple[list[float], str]]:
        groups = [phrases] if self.at_once else [[phrase] for phrase in phrases]
        outputs = [self.model(**self.processor(text=[group], images=image, return_tensors="pt")) for group in groups]
        scores, best = torch.cat([output.logits[0] for output in outputs], dim=1).sigmoid().max(dim=1)
        x, y, w, h = (outputs[0].pred_boxes[0] * max(image.size)).unbind(1)  # of the square that the image is padded to
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
        limit = torch.tensor([*image.size, *image.size])
        boxes = boxes.clamp(min=0).minimum(limit)
        keep = (scores > MIN_SCORE) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        order = scores[keep].argsort(descending=True, stable=True)
        return [(boxes[keep][i].tolist(), phrases[best[keep][i]]) for i in order]


def plain_loop(shard: Path, captioner: AltTextAfterwards, phrases: Phrases, detector: PlainDetector) -> list:
    """What the README of a captioner and of a detector would have you write."""
    found = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                alt_text = tar.extractfile(member).read().decode()
                image = Image.open(io.BytesIO(tar.extractfile(member.name.replace(".txt", ".jpg")).read())).convert("RGB")
                (caption,) = captioner.caption([image], [alt_text])
                found.append(detector(image, phrases.extract(caption)))
    return found


def regions_of(folder: LabelFolder) -> list:
    """The labelled shards' boxes and phrases, an entry per image."""
    return [[(r["box"], r["phrases"][0]) for r in record["regions"]] for _, _, record in labelled_records(folder)]


def differences(a: list, b: list) -> int:
    """Images whose boxes or phrases differ: with other numbers of boxes, or with a box to which none of the same phrase in the
    other list is nearer than a tenth of a pixel."""

    def same(x: list, y: list) -> bool:
        boxes = [{phrase: [box for box, other in side if other == phrase] for _, phrase in side} for side in (x, y)]
        return boxes[0].keys() == boxes[1].keys() and all(
            len(ours) == len(boxes[1][phrase])
            and np.abs(np.array(ours)[:, None] - np.array(boxes[1][phrase])[None]).max(-1).min(1).max() < 0.1
            for phrase, ours in boxes[0].items()
        )

    return sum(not same(x, y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", help="name or folder (default: a small BLIP drawn at random)")
    parser.add_argument("--detector", help="name or folder of an OWLv2 at 448 px (default: a small one drawn at random)")
    parser.add_argument("--images", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of a caption (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blip, owl = make_models(folder)
        shard, output = folder / "00000.tar", LabelFolder(folder / "labelled")
        write_images(shard, args.images)
        captioner = AltTextAfterwards(Captioner.from_pretrained(args.captioner or blip, max_new_tokens=args.max_new_tokens))
        detector = Detector.from_pretrained(args.detector or owl, image_size=448, min_score=MIN_SCORE)
        phrases, found, said = Phrases(), {}, {}

        def pipeline() -> None:
            shutil.rmtree(output.path, ignore_errors=True)
            detector.scores.embed_phrases._known.clear()  # every round begins as a run does
            parts = (Part(partial(_given, part), {}) for part in (captioner, phrases, detector))
            job = LabelJob(output, *parts, caption_batch=args.batch, detection_batch=args.batch)
            label(job, *open_input(str(shard)), progress=False)
            found["pipeline"] = regions_of(output)

        def plain(key: str, plain_detector: PlainDetector) -> None:
            found[key] = plain_loop(shard, captioner, phrases, plain_detector)

        detectors = {key: PlainDetector(args.detector or owl, key == "one pass") for key in ("plain", "one pass")}
        variants: dict[str, Callable[[], None]] = {key: partial(plain, key, each) for key, each in detectors.items()}
        variants["pipeline"] = pipeline
        for key, work in variants.items():
            work()
            said[key], captioner.said = captioner.said, []
        for key in detectors:
            if said[key] != said["pipeline"]:
                raise DataError(f"captions of '{key}' and of the pipeline differ; they should agree")
            if wrong := differences(found[key], found["pipeline"]):
                raise DataError(
                    f"boxes of '{key}' and of the pipeline differ in {wrong} of {args.images} images; they should agree"
                )
        boxes = sum(map(len, found["pipeline"]))
        device = torch.device("cpu")
        report = report_of(in_turn(variants, args.rounds, device), BARS, device)
    for medians in report["variants"].values():
        medians["images_per_second"] = args.images / medians["seconds"]
    show(report, args.out)
    rates = ", ".join(f"{name} {medians['images_per_second']:.2f}" for name, medians in report["variants"].items())
    print(f"images per second: {rates}; all captions and {boxes} boxes the same")


def _given(part):
    return part


if __name__ == "__main__":
    run_main(main)
