"""What a pretraining run starts from: the model, of a preset or of any encoder, and its processor."""

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from encoder.checkpoint import LATEST, TOKENIZER
from encoder.config import PRESETS, ClocConfig, ClocSiglipConfig
from encoder.data.order import RecordOrder
from encoder.data.reader import RegionDataset
from encoder.distributed import rank
from encoder.errors import DataError
from encoder.from_clip import cloc_config, from_clip
from encoder.losses import LossConfig
from encoder.model import ClocModel
from encoder.pretrained import WHOLE, folder_kind, load_processor, load_strict, load_tokenizer, stock_config
from encoder.pretraining_config import PretrainConfig
from encoder.processor import ClocImageProcessor, ClocProcessor
from encoder.prompter import Prompter
from encoder.siglip import ClocSiglipModel
from encoder.tokenizer import train_text_tokenizer

# Where SigLIP's biases and 1/temperature start (arXiv 2303.15343, Section 3.2): nearly every pair of a batch is a negative.
SIGMOID_BIAS, SIGMOID_SCALE = -10.0, 10.0
BIASES = ("logit_bias", "region_logit_bias")
TOKENIZER_RECORDS = 200_000  # a small vocabulary learns no more from more


def model_fields(config: PretrainConfig, loss_config: LossConfig) -> dict[str, Any]:
    """What the run sets in the model's configuration: its own fields, and a bias where the loss needs one."""
    given = dict(config.model_fields)
    if adds_biases(config, loss_config):
        given.setdefault("logit_bias_init_value", SIGMOID_BIAS)
    is_siglip = config.init is not None and "siglip" in folder_kind(config.init)
    unknown = given.keys() - {field.name for field in fields(ClocSiglipConfig)} if is_siglip else ()
    if unknown:
        raise DataError(f"{config.init} is a SigLIP, which has no {' and no '.join(sorted(unknown))}; leave that out")
    return given


def adds_biases(config: PretrainConfig, loss_config: LossConfig) -> bool:
    """Whether the sigmoid loss's biases are new to the model: any SigLIP has them, and a CLOC trained with them."""
    if loss_config.contrastive != "sigmoid":
        return False
    kind = folder_kind(config.init) if config.init else ""
    if kind == "cloc":
        return ClocConfig.from_pretrained(config.init).logit_bias_init_value is None
    return "siglip" not in kind


def start_config(config: PretrainConfig, loss_config: LossConfig) -> ClocConfig | ClocSiglipConfig:
    """The configuration of the model that a run trains, read without its weights."""
    given = model_fields(config, loss_config)
    if not config.init:
        if config.preset not in PRESETS:
            raise DataError(f"preset '{config.preset}' is not known; choose one of {', '.join(PRESETS)}")
        return PRESETS[config.preset](vocab_size=config.vocab_size, **given)
    kind = folder_kind(config.init)
    if kind.startswith("cloc"):
        return WHOLE[kind].config_class.from_pretrained(config.init, **given)
    return cloc_config(stock_config(config.init), **given)


def make_model(
    config: PretrainConfig, loss_config: LossConfig, dataset: RegionDataset
) -> tuple[ClocModel | ClocSiglipModel, ClocProcessor]:
    """The model to train, the same on every rank, and its processor."""
    given, new_biases = model_fields(config, loss_config), adds_biases(config, loss_config)
    torch.manual_seed(config.seed)
    if config.init:
        kind = folder_kind(config.init)
        if kind.startswith("cloc"):
            model = _load_cloc(kind, config.init, BIASES if new_biases else (), given)
        else:
            model = from_clip(config.init, **given)
        processor = load_processor(config.init, config.tokenizer)
        images = processor.image_processor
        images.geometry = model.config.geometry = given.get("geometry", images.geometry)
    else:
        text = start_config(config, loss_config).text_config
        if config.tokenizer:
            tokenizer = load_tokenizer(Path(config.tokenizer), text.to_dict())
        else:
            tokenizer = own_tokenizer(config, dataset, text.max_position_embeddings)
        model = ClocModel(PRESETS[config.preset](vocab_size=len(tokenizer), **given))
        image_processor = ClocImageProcessor(size=model.config.vision_config.image_size, geometry=model.config.geometry)
        processor = ClocProcessor(image_processor, tokenizer)
    scales = [scale for scale in (model.logit_scale, model.region_logit_scale) if scale is not None]
    for scale in scales if new_biases else ():
        scale.data.fill_(math.log(SIGMOID_SCALE))
    highest = max(float(scale.detach().exp()) for scale in scales)
    if config.init and highest > 1.001 * loss_config.max_logit_scale:
        raise DataError(
            f"{config.init}: 1/temperature is {highest:.1f}, above max_logit_scale {loss_config.max_logit_scale:g}, to which the "
            f"first step would cut it; pass --max_logit_scale {math.ceil(1.2 * highest)}"
        )
    return model, processor


def _load_cloc(kind: str, folder: str, may_miss: tuple[str, ...], given: dict[str, Any]) -> ClocModel | ClocSiglipModel:
    """A CLOC's folder with fields of its configuration replaced; of one Prompter become two where they shall be apart."""
    cls = WHOLE[kind]
    saved = cls.config_class.from_pretrained(folder)
    shared = saved.prompter_shared
    asked = given.get("prompter_shared", shared) if saved.region_encoder == "prompter" else shared
    if asked and not shared:
        raise DataError(f"{folder} has a Prompter of its own for texts, which prompter_shared true would drop; pass false")
    model = load_strict(cls, folder, may_miss, dtype=torch.float32, **given | {"prompter_shared": shared})
    if asked != shared:
        part_prompters(model)
        if rank() == 0:
            print(f"{folder} has one Prompter for boxes and texts: both of prompter_shared false start from it", flush=True)
    return model


def part_prompters(model: ClocModel | ClocSiglipModel) -> None:
    """Gives texts a Prompter of their own, equal to the one that they shared with boxes: the model's outputs stay the same."""
    state = model.prompter.state_dict()
    model.config.prompter_shared = False
    model.text_prompter = Prompter(model.config, boxes=False)
    model.text_prompter.load_state_dict({name: state[name] for name in model.text_prompter.state_dict()})
    model.prompter.text_input = None


def own_tokenizer(config: PretrainConfig, dataset: RegionDataset, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model from scratch, trained on the run's texts; a run that goes on has the one it began with."""
    kept = Path(config.output) / TOKENIZER
    if (Path(config.output) / LATEST).is_file() and kept.is_dir():
        return AutoTokenizer.from_pretrained(kept)
    tokenizer = train_text_tokenizer(texts_of(dataset, config.seed), config.vocab_size, max_length)
    if rank() == 0 and len(tokenizer) < config.vocab_size:
        print(f"tokenizer: the texts yield {len(tokenizer)} pieces of the {config.vocab_size} of vocab_size", flush=True)
    return tokenizer


def texts_of(dataset: RegionDataset, seed: int) -> Iterator[str]:
    """The texts of up to `TOKENIZER_RECORDS` records, the same on every rank; of each source by its weight."""
    order = RecordOrder(dataset.counts, dataset.weights, seed, lanes=1, window=TOKENIZER_RECORDS)
    for index in np.unique(order.records(0, 0, min(len(dataset), TOKENIZER_RECORDS))).tolist():  # sorted: read as they lie
        try:
            record = dataset.record(index)
        except DataError as error:
            dataset.broken.add(error)
            continue
        yield from record.captions
        if record.alt_text:
            yield record.alt_text
        yield from (phrase for region in record.regions for phrase in region.phrases)
