r"""What the way from a text to a box needs: trains it alone, on the frozen towers of a CLOC, under several settings.

    python scripts/study_text_to_box.py --model weights/cloc --shards runs/scenes/shards/train --scenes runs/scenes \
        --out runs/text_to_box

A fresh Prompter for texts and a fresh BoxHead learn to point at names; the towers' tokens and texts are computed once, so a
setting takes seconds to minutes. Scored on names that a scene shows once, in scenes that no training saw.

B images, N image tokens, R regions, D width, E joint space.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from encoder.boxes import paired_iou
from encoder.data.reader import RegionDataset
from encoder.errors import DataError, run_main
from encoder.losses import grounding_loss
from encoder.model import ClocModel
from encoder.pretrained import load_encoder, load_processor
from encoder.processor import ClocProcessor
from eval.coco_files import read_instances
from eval.metrics import mean_interval
from eval.region_classification import as_targets, usable_rows
from mllm.image_input import read_picture

BATCH_SIZE = 32  # images
MAX_SCORED = 2000  # regions


@dataclass(frozen=True)
class Setting:
    """norm: of the grounding loss; once: learn from the names alone that their picture shows once; rate: peak, after a tenth
    of the steps, then a cosine to zero; readout: the Prompter's; frozen_prompter: in place of a fresh Prompter the model's own
    for boxes, as it is, with a fresh way in for texts: what is left to learn when boxes have shaped a shared one"""

    norm: str = "mse"
    once: bool = False
    rate: float = 1e-3
    steps: int = 1000
    readout: str = "prompt"
    frozen_prompter: bool = False


SETTINGS = {
    "mse": Setting(),
    "l1_giou": Setting("l1_giou"),
    "mse, frozen Prompter": Setting(frozen_prompter=True),
    "mse, names once": Setting(once=True),
    "l1_giou, names once": Setting("l1_giou", once=True),
    "l1_giou, rate x3": Setting("l1_giou", rate=3e-3),
    "l1_giou, steps x4": Setting("l1_giou", steps=4000),
    "l1_giou, mean readout": Setting("l1_giou", readout="mean"),
}


@dataclass
class Pictures:
    """tokens: (B, N, D) of the frozen tower; boxes: (R, 4) xyxy in [0, 1]; image_index: (R,); names: (R,) into the list of
    texts; once: (R,) bool, whether the picture shows that name once"""

    tokens: Tensor
    boxes: Tensor
    image_index: Tensor
    names: Tensor
    once: Tensor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a CLOC; its towers stay as they are")
    parser.add_argument("--shards", required=True, help="region shards to learn from, as of pretrain_encoder.py")
    parser.add_argument("--scenes", type=Path, required=True, help="folder of make_scenes.py to score on")
    parser.add_argument("--pictures", type=int, default=4000, help="of the shards, the first (default 4000)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME", help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for text_to_box.json")
    return parser.parse_args()


@torch.no_grad()
def encode(model: ClocModel, processor: ClocProcessor, samples: list[tuple], texts: list[str]) -> Pictures:
    """samples: (load a picture, boxes in pixels, names) per picture; names that `texts` lacks are added to it."""
    number = {text: index for index, text in enumerate(texts)}
    tokens, boxes, image_index, names, once = [], [], [], [], []
    for start in tqdm(range(0, len(samples), BATCH_SIZE), desc="tokens", unit="batch"):
        part = samples[start : start + BATCH_SIZE]
        inputs, geometries = processor.images([load() for load, *_ in part])
        tokens.append(model.encode_image(inputs["pixel_values"].to(model.device)).tokens)
        for image, (geometry, (_, boxes_px, words)) in enumerate(zip(geometries, part, strict=True), start):
            boxes.append(geometry.boxes_to_model(torch.tensor(boxes_px, dtype=torch.float32)))
            image_index += [image] * len(words)
            names += [number.setdefault(word, len(number)) for word in words]
            once += [words.count(word) == 1 for word in words]
    texts[:] = number
    return Pictures(torch.cat(tokens), torch.cat(boxes), *map(torch.tensor, (image_index, names, once)))


def training_samples(dataset: RegionDataset, count: int) -> list[tuple]:
    """The first records that have regions, named by their first phrases."""
    records = ((index, dataset.record(index)) for index in range(min(count, len(dataset))))
    return [
        (lambda index=index: dataset[index][0], [region.box for region in record.regions], [r.phrases[0] for r in record.regions])
        for index, record in records
        if record.regions
    ]


def scored_samples(scenes: Path) -> list[tuple]:
    """The pictures with boxes of seen names, as for `training_samples`."""
    instances = read_instances(scenes / "regions" / "seen.json")
    by_image: dict[str, list] = {}
    for target in as_targets(instances, usable_rows(instances, 0)[0]):
        by_image.setdefault(target.image, []).append(target)
    return [
        (lambda image=image: read_picture(scenes / "images" / image), [t.box for t in targets], [t.category for t in targets])
        for image, targets in by_image.items()
    ]


def learn(model: ClocModel, data: Pictures, text_feat_TE: Tensor, setting: Setting, seed: int) -> ClocModel:
    """A model of which only the text Prompter and the BoxHead are used, trained on `data`."""
    torch.manual_seed(seed)
    fields = {"prompter_shared": False, "prompter_readout": setting.readout}
    fresh = ClocModel(type(model.config)(**{**model.config.to_dict(), **fields})).to(model.device).train()
    if setting.frozen_prompter:
        own = {name: value for name, value in model.prompter.state_dict().items() if name in fresh.text_prompter.state_dict()}
        fresh.text_prompter.load_state_dict({**fresh.text_prompter.state_dict(), **own})
        fresh.text_prompter.requires_grad_(False)
        fresh.text_prompter.text_input.reset_parameters()
        fresh.text_prompter.text_input.requires_grad_(True)
    parameters = [*fresh.text_prompter.parameters(), *fresh.box_head.parameters()]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.rate, setting.steps, pct_start=0.1, cycle_momentum=False)
    usable_R = data.once if setting.once else torch.ones_like(data.once)
    order = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(setting.steps), desc="steps"):
        chosen = torch.randperm(len(data.tokens), generator=order)[:BATCH_SIZE]
        regions = (torch.isin(data.image_index, chosen) & usable_R).nonzero().flatten()
        if not len(regions):
            continue
        predicted = answer(fresh, data, text_feat_TE, regions)
        loss = grounding_loss(predicted, data.boxes[regions], len(regions), setting.norm)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return fresh.eval()


def answer(model: ClocModel, data: Pictures, text_feat_TE: Tensor, regions_R: Tensor) -> Tensor:
    """The boxes (R, 4) that the names of these regions are answered with, xyxy in [0, 1] of the square input."""
    images, place_R = data.image_index[regions_R].unique(return_inverse=True)
    grounded_RE = model.embed_texts(data.tokens[images], text_feat_TE[data.names[regions_R]], place_R)
    return model.predict_boxes(grounded_RE)


@torch.no_grad()
def score(model: ClocModel, data: Pictures, text_feat_TE: Tensor) -> dict:
    """Of the names that a picture shows once, the first `MAX_SCORED`. IoU in the square input: the same as in pixels, where
    padding keeps shapes."""
    regions = data.once.nonzero().flatten()[:MAX_SCORED]
    parts = [answer(model, data, text_feat_TE, part) for part in regions.split(4 * BATCH_SIZE)]
    corners_R22 = torch.cat(parts).unflatten(-1, (2, 2))
    boxes_R4 = torch.cat([corners_R22.amin(1), corners_R22.amax(1)], dim=-1)
    iou, images = paired_iou(boxes_R4, data.boxes[regions]).double().numpy(), data.image_index[regions].numpy()
    middle = np.abs((boxes_R4 - data.boxes[regions]).unflatten(-1, (2, 2)).mean(1).numpy()).mean(-1)
    return {
        "acc_50": vars(mean_interval(iou >= 0.5, images)),
        "mean_iou": vars(mean_interval(iou, images)),
        "centre_error": vars(mean_interval(middle, images)),
    }


def main() -> None:
    args = parse_arguments()
    model, processor = load_encoder(args.model), load_processor(args.model)
    if getattr(model, "box_head", None) is None or not isinstance(model, ClocModel):
        raise DataError(f"--model {args.model} has no BoxHead; give the folder of a CLOC on CLIP's towers, with a Prompter")
    texts: list[str] = []
    train = encode(model, processor, training_samples(RegionDataset(args.shards), args.pictures), texts)
    held_out = encode(model, processor, scored_samples(args.scenes), texts)
    with torch.no_grad():
        text_feat_TE = model.encode_text(**processor.texts(texts).to(model.device))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "text_to_box.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    facts = {"model": str(args.model), "pictures": len(train.tokens), "seed": args.seed}
    results["the model's own head"] = {**facts, **score(model, held_out, text_feat_TE)}
    for name in args.settings:
        learned = learn(model, train, text_feat_TE, SETTINGS[name], args.seed)
        scores = {"train_" + key: value for key, value in score(learned, train, text_feat_TE).items()}
        results[name] = {**facts, **asdict(SETTINGS[name]), **score(learned, held_out, text_feat_TE), **scores}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"{name}: acc@0.5 {results[name]['acc_50']['value']:.3f}, mean IoU {results[name]['mean_iou']['value']:.3f}",
            flush=True,
        )
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"done: {path}")


if __name__ == "__main__":
    run_main(main)
