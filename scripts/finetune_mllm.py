"""Trains an MLLM by a recipe, plain or under DeepSpeed; any field of the recipe is also a flag.

    python scripts/finetune_mllm.py scripts/recipes/nano_align.yaml --tower runs/cloc --output runs/mllm_cloc
    deepspeed --num_gpus 2 scripts/finetune_mllm.py scripts/recipes/llava15_7b_finetune.yaml --model runs/align

    python scripts/finetune_mllm.py scripts/recipes/llava15_7b_finetune.yaml --dry-run --processes 8

--dry-run says what learns, the memory by ZeRO stage, steps and tokens, and prints and draws the first batch.
The same command again goes on from the last checkpoint.
"""

import argparse
import logging
import os
import sys

# Read by transformers when it is imported: nothing here comes from a hub, and loading takes no progress bars.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "15")  # a log keeps every redraw of a progress bar

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that is not used

from encoder.arguments import add_fields  # noqa: E402
from encoder.errors import DataError, run_main  # noqa: E402
from encoder.launch import own_environment, slurm_environment  # noqa: E402
from mllm.config import MllmConfig, load_config  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="YAML file of fields; see scripts/recipes")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("--dry-run", action="store_true", help="tell what the run would do, and train nothing")
    parser.add_argument("--processes", type=int, help="of the run that --dry-run tells about; 1 if not given")
    add_fields(parser, MllmConfig, "fields of the recipe")
    flags = vars(parser.parse_args())
    os.environ |= slurm_environment(os.environ)
    recipe, local_rank = flags.pop("recipe"), flags.pop("local_rank")
    dry, processes = flags.pop("dry_run"), flags.pop("processes")
    if processes is not None and not dry:
        raise DataError("--processes is of --dry-run alone; a run has those of its launcher, such as deepspeed --num_gpus 8")
    config = load_config(recipe, flags)
    # Slow to import; a mistake in the recipe is told before.
    from transformers.utils.logging import disable_progress_bar

    from mllm.training import train

    disable_progress_bar()
    if dry:
        from mllm.dry_run import dry_run

        dry_run(config, 1 if processes is None else processes)
        return
    if config.zero:  # DeepSpeed wants a group, also under plain python
        os.environ |= own_environment(os.environ)
    train(config, launched=local_rank is not None)


if __name__ == "__main__":
    run_main(main)
