"""What a labelled collection holds: the columns of the paper's Table 1 (arXiv 2410.02746), and what stands beside them."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from encoder.data.records import parse_object
from encoder.vesl.inputs import OpenShard, Sample, TarInput
from encoder.vesl.stage_files import LabelFolder

MOST_COMMON = 20  # phrases that are listed

# Images, regions an image, length of an image's text, of a region's text, in tokens: VESL's rows of Table 1, and its baseline.
PUBLISHED = {
    "VESL on WiT (paper)": ("300M", 11.6, 44.9, 2.1),
    "VESL on WiT and DFN (paper)": ("2B", 11.5, 35.9, 2.1),
    "WiT labelled as in OWLv2 (paper)": ("300M", 5.1, 17.1, 3.9),
}


def labelled_records(folder: LabelFolder) -> Iterator[tuple[OpenShard, Sample, dict[str, Any]]]:
    """Every record of the labelled shards, in order, with its shard, which is open until the next one is asked for."""
    for path in sorted(folder.path.glob("*.tar")):
        with TarInput(path, path.stem).open() as shard:
            for sample in shard.samples:
                yield shard, sample, parse_object(shard.member(sample, "json"), f"{shard.where(sample)}.json")


def statistics(folder: LabelFolder, lengths: Callable[[list[str]], list[int]]) -> dict[str, Any]:
    """Counts and means over all labelled shards of a folder.

    lengths: texts -> tokens of each
    An image's text is its caption, each where it has several, or its alt-text where it has none; a region's is its first
    phrase. The mean of nothing is None.
    """
    images, texts, text_tokens, with_regions, regions = 0, 0, 0, 0, 0
    phrases, queries = Counter(), 0
    for _, _, record in labelled_records(folder):
        of_image = record.get("captions") or [record["alt_text"]]
        images += 1
        texts += len(of_image)
        text_tokens += sum(lengths(of_image))
        with_regions += bool(record["regions"])
        regions += len(record["regions"])
        queries += len(record.get("queries", ()))
        phrases.update(region["phrases"][0] for region in record["regions"])
    region_tokens = sum(length * phrases[phrase] for phrase, length in zip(phrases, lengths(list(phrases)), strict=True))
    return {
        "images": images,
        "regions_per_image": _mean(regions, images),
        "image_text_tokens": _mean(text_tokens, texts),
        "region_text_tokens": _mean(region_tokens, regions),
        "regions": regions,
        "images_with_regions": with_regions,
        "phrases_asked_per_image": _mean(queries, images),
        "different_phrases": len(phrases),
        "most_common_phrases": dict(phrases.most_common(MOST_COMMON)),
    }


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def token_lengths(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    """Texts -> tokens of each by a tokenizer of transformers, without those that only mark a text's beginning or end."""

    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    return lengths


def table_row(found: dict[str, Any]) -> str:
    """The row of Table 1 in one line."""
    means = [found[key] for key in ("regions_per_image", "image_text_tokens", "region_text_tokens")]
    shown = ["-" if mean is None else f"{mean:.1f}" for mean in means]
    row = f"{found['images']} images, {shown[0]} regions an image"
    return f"{row}, image text of {shown[1]} tokens, region text of {shown[2]} tokens"
