"""The features of a data set's regions, found once where the tower is frozen: beside its cached picture features.

(R regions of the data set, F width of a region's feature.)
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from encoder.distributed import rank, world_size
from encoder.pretrained import weights_hash
from mllm.data import ConversationDataset
from mllm.features import cache_key, create_file, wait_for_all
from mllm.region_tokens import RegionLlavaForConditionalGeneration


@torch.inference_mode()
def features_on(
    model: RegionLlavaForConditionalGeneration, dataset: ConversationDataset, pictures: np.ndarray
) -> tuple[np.ndarray, Tensor]:
    """Which regions lie on these pictures (indices into `image_files`), (r,), and their features (r, F)."""
    of_regions = dataset.regions.images
    regions = np.flatnonzero(np.isin(of_regions, pictures))
    pictures = np.unique(of_regions[regions])
    if not len(regions):
        return regions, torch.zeros(0, model.model.region_tokens.projector.linear_1.in_features)
    inner, place = model.model, {picture: number for number, picture in enumerate(pictures.tolist())}
    tower = inner.vision_tower
    pixels = torch.cat([dataset.pixels(picture)[:1] for picture in pictures.tolist()]).to(tower.device, tower.dtype)
    tokens = inner.last_tokens(tower(pixels).last_hidden_state)
    index = torch.tensor([place[picture] for picture in of_regions[regions].tolist()], device=tokens.device)
    inputs = {name: value.to(tokens.device) for name, value in dataset.regions.inputs(regions).items()}
    return regions, inner.region_tokens.features(tokens, index, **inputs).float().cpu()


def cache_region_features(
    model: RegionLlavaForConditionalGeneration,
    dataset: ConversationDataset,
    folder: str | Path,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """(R, F) float32 of all regions of the data set, mapped from disk; computed where missing.

    folder: where caches are kept; one subfolder for everything that the features depend on
    With several processes each computes its share of the pictures.
    """
    width = model.model.region_tokens.projector.linear_1.in_features
    shape = len(dataset.regions), width
    if not shape[0]:
        return torch.zeros(shape)
    folder = Path(folder) / _key(model, dataset)
    path, done = folder / "regions.float32", folder / "regions.done"
    if not done.is_file():
        create_file(path, 4 * shape[0] * width)
        features = np.memmap(path, np.float32, "r+", shape=shape)
        pictures = np.unique(dataset.regions.images)
        starts = range(rank() * batch_size, len(pictures), batch_size * world_size())
        for start in tqdm(starts, desc="region features", unit="batch", disable=not progress or rank() > 0):
            regions, found = features_on(model, dataset, pictures[start : start + batch_size])
            features[regions] = found.numpy()
        features.flush()
        wait_for_all()
        if rank() == 0:
            done.touch()
        wait_for_all()
    return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=shape))


def _key(model: RegionLlavaForConditionalGeneration, dataset: ConversationDataset) -> str:
    inner = model.model
    digest = hashlib.sha256(cache_key(inner.vision_tower, -1, dataset).encode())
    digest.update(f"{model.config.region_tokens} {model.config.prompter}".encode())
    if inner.region_tokens.prompter is not None:
        digest.update(weights_hash(inner.region_tokens.prompter).encode())
    digest.update(dataset.regions.fingerprint().encode())
    return digest.hexdigest()[:16]


def measure_region_features(
    model: RegionLlavaForConditionalGeneration, dataset: ConversationDataset, num_pictures: int = 64
) -> Tensor:
    """(r, F) float32: features of the regions of evenly spread pictures."""
    pictures = np.unique(dataset.regions.images)
    chosen = np.linspace(0, len(pictures) - 1, min(num_pictures, len(pictures))).astype(int) if len(pictures) else []
    return features_on(model, dataset, pictures[chosen])[1].clone()
