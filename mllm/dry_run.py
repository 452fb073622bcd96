"""A recipe before it is run: what learns, what it costs in memory, how long it is, and its first batch as a person reads it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from encoder.costs import state_bytes
from encoder.errors import DataError
from mllm.box_text import BoxCodec
from mllm.config import PARTS, MllmConfig
from mllm.conversation import IMAGE
from mllm.costs import low_bit_bytes, meta_mllm, mllm_cost
from mllm.data import ConversationDataset
from mllm.image_input import read_picture
from mllm.model import Mllm, check_rows, check_settings, check_tiles, first_settings, part_of, read_tokenizer
from mllm.opening import read_mllm
from mllm.packing import TokenRow
from mllm.preview import CELL, Sample, draw_sheet
from mllm.regions import COORDS, Region, around_point
from mllm.templates import choose_template
from mllm.tokenizer import add_region_token
from mllm.trainer import MllmTrainer
from mllm.training import read_dataset, training_arguments

GIB = 2**30
MARKS = "\u00ab", "\u00bb"  # around what is supervised


def dry_run(config: MllmConfig, processes: int = 1) -> Path:
    """Prints all of it and returns the picture of the first batch, `OUTPUT/first_batch.png`. No weights are read."""
    if processes < 1:
        raise DataError(f"processes is {processes}; give 1 or more")
    mllm = outline(config)
    dataset = read_dataset(config, mllm, config.data)
    for line in (*parts(mllm.model), *memory(config, mllm.model, processes), *duration(config, dataset, processes)):
        print(line, flush=True)
    samples = []
    for row in first_batch(config, dataset, processes):
        text = readable(row, mllm)
        print(f"\n{text}", flush=True)
        samples.append(sample_of(row, text, dataset, BoxCodec(mllm.settings.codec)))
    out = Path(config.output) / "first_batch.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(samples, mllm.settings.image.frame, mllm.settings.image.size).save(out)
    print(f"\nsupervised text stands in {' '.join(MARKS)}; the first batch of process 0 is drawn in {out}", flush=True)
    return out


def outline(config: MllmConfig) -> Mllm:
    """The recipe's tokenizer and settings as in training, its model without data."""
    model = meta_mllm(config)
    check_rows(config, model.config.text_config)
    if config.model:
        tokenizer, settings = read_mllm(config.model)
        check_settings(config, settings, model.config.projector_hidden_act)
        if config.template != "auto":
            settings.template = choose_template(tokenizer, config.template)
        if config.new_regions and settings.regions == COORDS:
            add_region_token(tokenizer)
            settings.regions = config.region_tokens
    else:
        tokenizer, _ = read_tokenizer(config)
        settings = first_settings(config, tokenizer)
    check_tiles(config, settings)
    return Mllm(model, tokenizer, settings)


def parts(model) -> Iterator[str]:
    """Parameters that learn and that are frozen, by part."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)][parameter.requires_grad] += parameter.numel()
    yield f"{'part':12}{'learns':>12}{'frozen':>12}   million parameters"
    for part, (frozen, learns) in counts.items():
        if frozen or learns:
            yield f"{part:12}{learns / 1e6:12.2f}{frozen / 1e6:12.2f}"


def memory(config: MllmConfig, model, processes: int) -> Iterator[str]:
    """GiB of one process by ZeRO stage, on `processes` of them; under ZeRO the weights are bf16."""
    activations = config.batch_size * mllm_cost(model, config).activation_bytes(config.gradient_checkpointing)
    yield f"\n{'memory, GiB':24}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'together':>10}"
    for stage in (None, 1, 2, 3):
        if stage is None:  # bf16 is autocast then, on float32 weights
            model = model.float()
        elif config.precision == "bf16":
            model = model.bfloat16()
        if config.llm_bits and stage == 3:
            continue
        held = state_bytes(model, stage, processes)
        held["weights"] -= low_bit_bytes(model, config)
        held["activations"] = activations
        name = "without DeepSpeed" if stage is None else f"ZeRO-{stage}, {processes} process{'es' * (processes > 1)}"
        cells = (held[key] / GIB for key in ("weights", "gradients", "optimizer", "activations"))
        widths = (10, 11, 11, 13)
        numbers = "".join(f"{value:{width}.3f}" for value, width in zip(cells, widths, strict=True))
        yield f"{name:24}{numbers}{sum(held.values()) / GIB:10.3f}"


def duration(config: MllmConfig, dataset: ConversationDataset, processes: int) -> Iterator[str]:
    """Steps and tokens."""
    batch = config.batch_size * config.gradient_accumulation * processes
    each = math.ceil(math.ceil(len(dataset) / (config.batch_size * processes)) / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(config.epochs * each)
    supervised = sum(int(dataset[index].supervised.sum()) for index in range(len(dataset)))
    total = int(dataset.lengths.sum())
    yield (
        f"\n{dataset.num_records:,} conversations on {len(dataset.image_files):,} pictures in {len(dataset):,} rows; "
        f"{total:,} tokens an epoch, {supervised:,} of them supervised; a row has {total / len(dataset):.0f}"
    )
    yield f"{steps:,} steps of {batch} rows, {steps * batch * total / len(dataset):,.0f} tokens, {each:,} steps an epoch"


def first_batch(config: MllmConfig, dataset: ConversationDataset, processes: int = 1) -> list[TokenRow]:
    """The rows that the first process meets first, in the Trainer's own order."""
    # Lengths are grouped over a whole step, and this one process stands for all: its step is then as large as theirs.
    alone = replace(config, report_to="none", val_data=[], gradient_accumulation=config.gradient_accumulation * processes)
    model = Mllm(torch.nn.Linear(1, 1), None, None)
    trainer = MllmTrainer(alone, model, dataset, None, {"train": list}, training_arguments(alone, None, Path(config.output)))
    return next(iter(trainer.get_train_dataloader()))


def readable(row: TokenRow, mllm: Mllm) -> str:
    """A row's text with `MARKS` around what is supervised; a picture is its one mark."""
    edges = [0, *(torch.tensor(row.supervised).diff().nonzero()[:, 0] + 1).tolist(), len(row.ids)]
    # Decoded up to each edge, since pieces decoded alone lose their spaces.
    texts = [mllm.tokenizer.decode(row.ids[:edge].tolist(), clean_up_tokenization_spaces=False) for edge in edges]
    spans = [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]
    return "".join(
        MARKS[0] + span + MARKS[1] if row.supervised[edge] else span for edge, span in zip(edges, spans, strict=False) if span
    )


def sample_of(row: TokenRow, text: str, dataset: ConversationDataset, codec: BoxCodec) -> Sample:
    """The row's first picture with the boxes and points that its text names, read back from the words."""
    lines = [line for line in text.replace(IMAGE, "").splitlines() if line.strip()]
    if not row.images:
        return Sample(Image.new("RGB", (CELL, CELL), "lightgrey"), [], [], lines)
    picture = read_picture(dataset.image_path(row.images[0]))
    geometry = dataset.image.geometry(*picture.size)
    if len(row.images) > 1:  # the words do not say which one they are about
        return Sample(picture, [], [], lines)
    regions = [Region(tuple(geometry.boxes_to_image(box.double()).tolist())) for box in codec.decode_all(text)]
    points = [geometry.points_to_image(point.double()).tolist() for point in codec.decode_points(text)]
    regions += [around_point(point, *picture.size) for point in points]
    return Sample(picture, regions, [str(number) for number in range(1, len(regions) + 1)], lines)
