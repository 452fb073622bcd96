"""Images a second on one core: our batches against a plain webdataset + PIL loop over the same shards, in one run.

    pip install webdataset && python benchmarks/reader.py
    python benchmarks/reader.py --shards DIR

Both shuffle, decode, resize to the model's square and normalise; ours also draws captions and regions, moves the boxes, and
tokenises. Rounds alternate, and what counts is the processor time of this one process, so that other work on the machine
takes no side. Then the budget: images a second that a GPU asks for at B/16, and what the cores beside it give.
"""

import argparse
import importlib.util
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from encoder.costs import encoder_cost, meta_encoder
from encoder.data.batches import RegionBatches
from encoder.data.cache import ShardCache
from encoder.data.reader import RegionDataset
from encoder.errors import run_main
from encoder.losses import LossConfig
from encoder.pretraining_config import PretrainConfig
from encoder.processor import OPENAI_MEAN, OPENAI_STD, ClocImageProcessor, ClocProcessor
from encoder.tokenizer import train_text_tokenizer

SIZE, BATCH, REGIONS = 224, 64, 12  # regions of a record: about the paper's 11.5
WORDS = "red green small large old wooden round bright bus tree apple house river dog chair lamp street window boat".split()


def paint(random: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG with the spectrum of photographs (amplitude falls as 1/f), so of a photograph's size and cost to decode."""
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    falloff = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height))
    noise = np.fft.fft2(random.standard_normal((3, height, width))) * falloff
    pixels = np.fft.ifft2(noise).real
    pixels = pixels[0] + 0.3 * pixels  # colours of photographs go together
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_shards(folder: Path, images: int, side: int, per_shard: int = 512) -> None:
    """Region shards of `images` records; a few dozen pictures, each used again and again."""
    random = np.random.default_rng(0)
    width, height = side, side * 3 // 4
    pictures = [paint(random, width, height) for _ in range(24)]
    for first in range(0, images, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for index in range(first, min(first + per_shard, images)):
                regions = []
                for _ in range(REGIONS):
                    x, y = random.uniform(0, width - 60), random.uniform(0, height - 60)
                    regions.append({"box": [x, y, x + 50, y + 50], "phrases": [" ".join(random.choice(WORDS, 2))]})
                caption = " ".join(random.choice(WORDS, 36))
                record = {"image": f"{index:06d}.jpg", "width": width, "height": height}
                record |= {"captions": [caption], "regions": regions}
                members = {"jpg": pictures[index % 24], "txt": caption[:80].encode(), "json": json.dumps(record).encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def plain_loop(shards: list[str]) -> Iterator[int]:
    """webdataset and PIL as in its own examples: decode, pad to a square, resize, to a normalised tensor."""
    import webdataset

    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))

    def transform(image: Image.Image) -> torch.Tensor:
        scale = SIZE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (SIZE, SIZE))
        square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (pixels - mean) / std

    data = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(1000)
    data = data.decode("pilrgb").to_tuple("jpg", "json").map_tuple(transform).batched(BATCH, partial=False)
    for images, _ in data:
        yield len(images)


def our_loop(batches: RegionBatches) -> Iterator[int]:
    """The batches as training reads them."""
    for step in range(len(batches)):
        yield len(batches[step]["pixel_values"])


def speed(loop: Callable[[], Iterator[int]], images: int) -> float:
    """Images per second of processor time."""
    start, done = time.process_time(), 0
    for count in loop():
        done += count
        if done >= images:
            break
    return done / (time.process_time() - start)


def flops_per_image() -> int:
    """Of a CLOC step at B/16 with four regions an image, forward and backward, counted by torch."""
    config = PretrainConfig(shards="none", output="none", preset="b16")
    return encoder_cost(meta_encoder(config, LossConfig()), config).flops(recompute=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="folder of your own region shards (.jpg); without it some are painted")
    parser.add_argument("--side", type=int, default=512, help="long side of the painted images, pixels (default 512)")
    parser.add_argument("--images", type=int, default=1024, help="images per round (default 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, alternating (default 3)")
    parser.add_argument("--cores", type=int, default=16, help="cores beside one GPU (default 16)")
    parser.add_argument("--tflops", type=float, default=989, help="the GPU's dense bf16 peak (default an H100's)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="the share of it that training reaches (default 0.4)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("webdataset") is None:
        sys.exit("error: webdataset is not installed, this benchmark compares with it; pip install webdataset")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.shards or temporary)
        if not arguments.shards:
            write_shards(folder, arguments.images, arguments.side)
        dataset = RegionDataset(folder, cache=ShardCache(Path(temporary) / "cache"))
        texts = [text for index in range(min(256, len(dataset))) for text in dataset.record(index).captions]
        processor = ClocProcessor(ClocImageProcessor(SIZE), train_text_tokenizer(texts, 512, 77))
        batches = RegionBatches(dataset, processor, BATCH)
        shards = [str(shard) for shard in dataset.shards]
        loops = {"plain": lambda: plain_loop(shards), "ours": lambda: our_loop(batches)}
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        for loop in loops.values():
            speed(loop, 2 * BATCH)  # imports, page cache
        for _ in tqdm(range(arguments.rounds), "rounds"):
            for name, loop in loops.items():
                speeds[name].append(speed(loop, arguments.images))
        size = dataset[0][0].size
    ours, plain = (float(np.median(speeds[name])) for name in ("ours", "plain"))
    ratios = sorted(a / b for a, b in zip(speeds["ours"], speeds["plain"], strict=True))
    flops = flops_per_image()
    needed = arguments.tflops * 1e12 * arguments.utilisation / flops
    print(f"images of {size[0]}x{size[1]} px, to {SIZE} px, batches of {BATCH}, {len(dataset)} records in {len(shards)} shards")
    print(f"plain webdataset + PIL: {plain:.0f} images/s per core")
    spread = f"(rounds {ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"ours:                   {ours:.0f} images/s per core, {np.median(ratios):.2f}x {spread}")
    print(
        f"budget: {flops / 1e9:.0f} GFLOP an image at B/16, {arguments.tflops:.0f} TFLOP/s at "
        f"{arguments.utilisation:.0%} -> {needed:.0f} images/s; {arguments.cores} cores give {ours * arguments.cores:.0f} "
        f"({ours * arguments.cores / needed:.2f}x of what is needed; {needed / ours:.1f} cores are)"
    )


if __name__ == "__main__":
    run_main(main)
