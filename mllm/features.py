"""A frozen tower run once: its features of every picture on disk, and a stand-in that feeds them to a stock Llava.

The projected layers of all pictures, CLS included where there is one, lie in one memory-mapped float16 array.
(I pictures, T tokens of the tower: N of the picture behind CLIP's CLS, D width of the projected layers side by side.)
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from encoder.distributed import rank, world_size
from encoder.errors import DataError
from encoder.pretrained import weights_hash
from mllm.config import layers_of
from mllm.data import Collator, ConversationDataset


class CachedTower(nn.Module):
    """Stands in the tower's place while training: what comes in as `pixel_values` is already the projected layer.

    layer: the Llava's `vision_feature_layer`, one or several
    """

    def __init__(self, layer: int | list[int]):
        super().__init__()
        self.layers = layers_of(layer)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """(I, T, D) features -> an output whose hidden states at `layer` they are."""
        features = pixel_values.float() if pixel_values.dtype == torch.float16 else pixel_values
        hidden_states = dict(zip(self.layers, features.chunk(len(self.layers), dim=-1), strict=True))
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=hidden_states)


def tower_features(tower: nn.Module, layer: int | list[int], pixels: Tensor) -> Tensor:
    """(I, 3, H, W) -> (I, T, D): the tower's hidden states at `layer`, several side by side."""
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    return torch.cat([hidden[number] for number in layers_of(layer)], dim=-1)


def cache_features(
    model: LlavaForConditionalGeneration,
    dataset: ConversationDataset,
    folder: str | Path,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """The tower's features of `dataset.image_files`, (I, T, D) float16 mapped from disk; computed where missing.

    folder: where caches are kept, one subfolder per tower, layer, image settings and set of pictures
    With several processes each computes its share. The tower runs in float32.
    """
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    folder = Path(folder) / cache_key(tower, layer, dataset)
    num_tokens = dataset.num_image_tokens + (model.config.vision_feature_select_strategy == "default")
    shape = (len(dataset.image_files), num_tokens, tower.config.hidden_size * len(layers_of(layer)))
    path, done = folder / "features.float16", folder / "features.json"
    if not done.is_file():
        create_file(path, 2 * int(np.prod(shape)))
        _fill(tower, layer, dataset, np.memmap(path, np.float16, "r+", shape=shape), batch_size, progress)
        wait_for_all()
        if rank() == 0:
            done.write_text(json.dumps({"shape": shape, "layer": layer, "image": dataset.image.as_dict()}, indent=2))
        wait_for_all()
    return torch.from_numpy(np.memmap(path, np.float16, "r+", shape=shape))


def cache_key(tower: nn.Module, layer: int | list[int], dataset: ConversationDataset) -> str:
    """Name of the cache: all that the features depend on; a picture counts by path, size and time of change."""
    digest = hashlib.sha256(f"{weights_hash(tower)} {layer} {dataset.image}".encode())
    for index, name in enumerate(dataset.image_files):
        stat = dataset.image_path(index).stat()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def create_file(path: Path, size: int) -> None:
    """A file of `size` bytes, made by the first process; the others wait for it."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)
    wait_for_all()


def wait_for_all() -> None:
    """Until every process is here."""
    if world_size() > 1:
        torch.distributed.barrier()


@torch.inference_mode()
def _fill(tower, layer, dataset, features, batch_size, progress) -> None:
    starts = range(rank() * batch_size, len(features), batch_size * world_size())
    device = next(tower.parameters()).device
    gigabytes = features.size * 2 / 1e9
    for start in tqdm(starts, desc=f"tower features ({gigabytes:.1f} GB)", unit="batch", disable=not progress or rank() > 0):
        end = min(start + batch_size, len(features))
        pixels = torch.cat([dataset.pixels(index) for index in range(start, end)]).to(device)
        hidden = tower_features(tower, layer, pixels.to(tower.dtype))
        if hidden.abs().max() > torch.finfo(torch.float16).max:
            raise DataError(f"the tower's features at layer {layer} leave float16's range; set cache_features to false")
        features[start:end] = hidden.to("cpu", torch.float16).numpy()
    features.flush()


def sample_features(features: Tensor, num_image_tokens: int, num_pictures: int = 256) -> Tensor:
    """(S, D) float32 patch tokens of evenly spread pictures of a cache, CLS left out."""
    index = torch.linspace(0, len(features) - 1, min(num_pictures, len(features))).long()
    return features[index][:, -num_image_tokens:].flatten(0, 1).float()


@torch.inference_mode()
def measure_features(model: LlavaForConditionalGeneration, dataset: ConversationDataset, num_pictures: int = 64) -> Tensor:
    """(S, D) float32 patch tokens of evenly spread pictures, from the tower itself."""
    count = len(dataset.image_files)
    index = torch.linspace(0, count - 1, min(num_pictures, count)).long().tolist()
    tower = model.model.vision_tower
    pixels = torch.cat([dataset.pixels(i) for i in index]).to(tower.device, tower.dtype)
    hidden = tower_features(tower, model.config.vision_feature_layer, pixels)
    return hidden[:, -dataset.num_image_tokens :].flatten(0, 1).float().clone()


def feature_collator(
    dataset: ConversationDataset,
    features: Tensor,
    image_token_id: int,
    pad_token_id: int,
    region_features: Tensor | None = None,
) -> Collator:
    """The collator that takes features from the cache; `region_features` of `mllm.region_features`, with region tokens."""
    parts = torch.zeros_like(features[:1]), image_token_id, pad_token_id, dataset.image_tokens, dataset.regions
    return Collator(lambda index: features[index : index + 1], *parts, region_features)
