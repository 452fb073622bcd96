"""The watch for numbers that are no numbers: noted on the device in every step, read when a log line is due.

The reports of the steps since the last line are on the device anyway, so looking costs no wait of its own. What is found
names the step, the rank and the records of its batch.
"""

from pathlib import Path

import torch
from torch import Tensor

from encoder.data.batches import RegionBatches
from encoder.distributed import gather, gather_lines, rank, world_size
from encoder.errors import DataError
from encoder.model import ClocOutput

NAMES_FILE = "not_finite.txt"


def bad_features(output: ClocOutput) -> Tensor:
    """() bool: whether a feature of this rank's batch is nan or infinite. No wait for the device."""
    features = (value for value in vars(output).values() if value is not None)
    return ~torch.isfinite(torch.stack([value.detach().float().sum() for value in features])).all()


def check_finite(window: list[dict], first_step: int, batches: RegionBatches, output: Path) -> None:
    """Raises a DataError, the same on every rank, if a step of `window` (reports of `train_step`) was not finite.

    The loss of every rank holds the features of all, so only the features tell whose batch it was. Where they are all
    right and the loss or the gradient is not, the batches of all ranks are named.
    first_step: step of the first report
    output: folder in which the records are listed
    """
    codes = []
    for report in window:
        numbers = [torch.as_tensor(report[key]).float() for key in ("loss", "grad_norm")]
        bad_numbers = ~torch.isfinite(torch.stack(numbers)).all()
        codes.append(torch.where(report["bad_features"], 2, bad_numbers.long()))
    codes_RS = gather(torch.stack(codes)[None], [1] * world_size()).cpu()  # ranks, steps
    bad_steps = codes_RS.any(dim=0).nonzero().flatten().tolist()
    if not bad_steps:
        return
    step, found = first_step + bad_steps[0], codes_RS[:, bad_steps[0]].tolist()
    guilty = [number for number, code in enumerate(found) if code == 2]
    ranks = guilty or list(range(world_size()))
    what = f"a feature of rank {' and '.join(map(str, guilty))}" if guilty else "the loss or the gradient, of finite features,"
    # All know by now that they end here, so the ranks whose batches it was have the time to look their records up.
    lines = gather_lines(_records(batches, step) if rank() in ranks else [])
    if rank() == 0:
        (output / NAMES_FILE).write_text("\n".join([f"step {step}", *lines]) + "\n")
    raise DataError(
        f"step {step}: {what} is nan or infinite; the batch was {len(lines)} records ({'; '.join(lines[:3])}"
        f"{', ...' if len(lines) > 3 else ''}), all listed in {output / NAMES_FILE}: look at them, lower learning_rate, or go "
        f"on from the last checkpoint in {output} with other data"
    )


def _records(batches: RegionBatches, step: int) -> list[str]:
    """The records of this rank's part of a batch, a line each: what was read, also in place of a broken one."""
    share, lines = batches.batch_size // batches.world_size, []
    for index in batches.indices(step, batches.rank * share, (batches.rank + 1) * share):
        try:
            lines.append(f"rank {batches.rank}: {batches.dataset.where(index)}")
        except (DataError, OSError) as error:  # the other ranks wait, and the others' records are known
            lines.append(f"rank {batches.rank}: record {index}, which cannot be looked up ({error})")
    return lines
