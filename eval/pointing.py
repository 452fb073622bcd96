"""How a question points at an annotated object: by its box, by a point of it, or by its outline."""

from encoder.errors import DataError
from encoder.masks import decode_mask, run_lengths
from eval.reflvis_records import point_inside


def region_of(
    kind: str, outline: list | dict | None, box: tuple[float, float, float, float], width: int, height: int, where: str
) -> dict | None:
    """A record's object for the question (see `mllm.regions`), None for `box`, which every question has anyway.

    kind: `box`, `point` or `mask`; outline: polygons or a run-length encoding; box: xyxy, pixels of the `width` x `height` image
    A point is RefLVIS' (`eval.reflvis_records.point_inside`); without an outline the middle of the
    box. Raises DataError where a mask is asked for and there is none.
    """
    if kind == "box":
        return None
    if not outline:
        if kind == "mask":
            raise DataError(f"{where} has no segmentation, so it cannot be asked for by its mask; use --region box or point")
        return {"point": [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]}
    try:
        mask = decode_mask(run_lengths(outline, width, height))
    except DataError:
        raise
    except Exception as error:  # what pycocotools raises for it
        raise DataError(f"{where}: its segmentation is no polygon and no run-length encoding ({error}); correct it") from None
    if not mask.any():
        raise DataError(f"{where}: its segmentation covers no pixel; use --region box")
    if kind == "mask":
        return {"mask": outline}
    return {"point": point_inside(mask)}
