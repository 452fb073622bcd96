"""Packed rows against padded ones on lengths like LLaVA's mix: supervised tokens a second.

    python benchmarks/packing.py
    python benchmarks/packing.py --scale 1 --width 2048 --layers 16 --batch 16 --device cuda --dtype bfloat16 --out packing.json

The mix is llava_v1_5_mix665k's parts by number of conversations; tokens of text are drawn for each part from a log-normal of
about its median and spread, set down below: an assumption, since the file is not at hand. Pictures are 576 tokens,
`max_length` 2048, all divided by `--scale`, which keeps the proportions. Both variants train the same stock Llama on
the same conversations through the same `Collator`, in batches of `--batch` rows in a random order: a row is a conversation
padded to its batch's longest, or what `mllm.packing.pack_rows` made. A third has batches of rows of like length. A round is
an epoch of each over the same conversations, in turn; the ratio is taken within a round. Picture tokens cost the language
model what they cost in training; the tower, which costs all variants the same a picture, is left out.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import get_length_grouped_indices

from mllm.data import Collator
from mllm.packing import TokenRow, own_row, pack_rows

BAR = 1.5
IMAGE_TOKENS, MAX_LENGTH = 576, 2048
# part: conversations of 665k; has a picture; median and spread (of the logarithm) of tokens of text; share supervised
MIX = {
    "LLaVA-instruct": (157_712, True, 300, 0.7, 0.75),
    "ShareGPT": (40_688, False, 1400, 0.8, 0.65),
    "VQAv2, several questions": (82_783, True, 140, 0.4, 0.2),
    "GQA, several questions": (72_140, True, 220, 0.6, 0.2),
    "OKVQA, A-OKVQA": (75_158, True, 60, 0.4, 0.1),
    "OCR-VQA, several questions": (80_000, True, 110, 0.3, 0.3),
    "TextCaps": (21_953, True, 70, 0.3, 0.2),
    "RefCOCO": (48_447, True, 250, 0.7, 0.5),
    "Visual Genome": (86_417, True, 280, 0.5, 0.45),
}
MARK, PAD, VOCABULARY = 1, 0, 1000


def draw_rows(count: int, scale: int, seed: int) -> list[TokenRow]:
    """Conversations of the mix; which tokens they are does not matter, only which are pictures and which are supervised."""
    rng = np.random.default_rng(seed)
    parts = list(MIX.values())
    numbers = np.array([part[0] for part in parts], float)
    rows = []
    for part in rng.choice(len(parts), count, p=numbers / numbers.sum()):
        _, picture, median, spread, share = parts[part]
        limit = (MAX_LENGTH - picture * IMAGE_TOKENS) // scale
        text = int(np.clip(rng.lognormal(np.log(median), spread) / scale, 4, limit))
        ids = np.concatenate([[MARK] * picture, rng.integers(2, VOCABULARY, text)]).astype(np.int32)
        supervised = np.zeros(len(ids), bool)
        supervised[-max(1, int(share * text)) :] = True
        rows.append(own_row(ids, supervised, (0,) * picture))
    return rows


def batches_of(rows: list[TokenRow], batch: int, grouped: bool, image_tokens: np.ndarray, seed: int) -> list[list[TokenRow]]:
    generator = torch.Generator().manual_seed(seed)
    if grouped:
        order = get_length_grouped_indices([row.length(image_tokens) for row in rows], batch, generator=generator)
    else:
        order = torch.randperm(len(rows), generator=generator).tolist()
    return [[rows[index] for index in order[start : start + batch]] for start in range(0, len(order), batch)]


def run(model, optimizer, batches: list, collate: Collator, device: torch.device) -> dict:
    """Trains on the batches -> supervised tokens a second, and the share of the computed tokens that are no padding."""
    done = real = computed = 0
    _wait(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    for rows in batches:
        batch = collate(rows)
        batch.pop("pixel_values")
        done += int((batch["labels"][:, 1:] != -100).sum())
        real += sum(row.length(collate.image_tokens) for row in rows)
        computed += batch["input_ids"].numel()
        model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {"tokens_per_second": done / seconds, "tokens_per_cpu_second": done / cpu_seconds, "filled": real / computed}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(arguments: argparse.Namespace) -> dict:
    device = torch.device(arguments.device)
    image_tokens, max_length = np.array([IMAGE_TOKENS // arguments.scale]), MAX_LENGTH // arguments.scale
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=max_length,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device, getattr(torch, arguments.dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    collate = Collator(lambda index: torch.zeros(1), torch.zeros(1), MARK, PAD, image_tokens)
    rows = draw_rows(arguments.conversations, arguments.scale, seed=0)
    packed = pack_rows(rows, image_tokens, max_length)
    variants = {"padded": (rows, False), "like lengths": (rows, True), "packed": (packed, False)}
    rounds: list[dict] = []
    for number in range(arguments.rounds + 1):  # the first warms up
        rounds.append({})
        for name, (some, grouped) in variants.items():
            batches = batches_of(some, arguments.batch, grouped, image_tokens, seed=number)
            rounds[-1][name] = run(model, optimizer, batches if number else batches[:2], collate, device)
    sizes = {key: getattr(arguments, key) for key in ("scale", "width", "layers", "batch", "conversations", "dtype")}
    report = {**sizes, "device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    report |= {"rows": len(rows), "packed_rows": len(packed), "rounds": rounds[1:]}
    for clock in ("second", "cpu_second"):
        for name in ("like lengths", "packed"):
            ratios = [one[name][f"tokens_per_{clock}"] / one["padded"][f"tokens_per_{clock}"] for one in rounds[1:]]
            report[f"{name}_{clock}_ratios"] = ratios
    return report


def show(report: dict) -> None:
    print(
        f"{report['rows']} conversations, {report['packed_rows']} packed rows, lengths / {report['scale']}, batches of "
        f"{report['batch']} rows, Llama {report['width']} x {report['layers']}, {report['dtype']}, {report['device']}, "
        f"{report['threads']} threads, torch {report['torch']}"
    )
    print(f"{'':16}{'tokens/s':>12}{'tokens/cpu s':>14}{'filled':>10}   ratio to padded (range)   by processor time")
    for name in report["rounds"][0]:
        medians = {key: statistics.median(one[name][key] for one in report["rounds"]) for key in report["rounds"][0][name]}
        line = f"{name:16}{medians['tokens_per_second']:12.0f}{medians['tokens_per_cpu_second']:14.0f}{medians['filled']:10.0%}"
        if name != "padded":
            ratios, cpu = report[f"{name}_second_ratios"], report[f"{name}_cpu_second_ratios"]
            line += f"   {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            line += f"          {statistics.median(cpu):5.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
        print(line)
    verdicts = [
        "met" if statistics.median(report[f"packed_{clock}_ratios"]) >= BAR else "MISSED" for clock in ("second", "cpu_second")
    ]
    print(f"packed against padded, bar {BAR}: {verdicts[0]}; by processor time, for a machine that is busy: {verdicts[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=8, help="what all lengths are divided by")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    report = compare(arguments)
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
