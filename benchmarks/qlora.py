"""Memory of a QLoRA step on a CPU: SmolLM2-135M's shape in 4 bits under a CLIP B/16 tower, projector and LoRA learning.

    python benchmarks/qlora.py
    python benchmarks/qlora.py --tokens 1024 --rows 2 --bits 8 --out qlora.json

The weights are random: memory does not depend on them. Everything is built and loaded by the code that trains, then come a
forward and backward pass and an AdamW step. What counts is the process' highest resident size, Python and all libraries
included, from its start on, less the bytes of the low-bit weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import LLM, TOWER
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mllm.config import MllmConfig
from mllm.lm_loss import choose_block, use_training_loss
from mllm.model import build_mllm, freeze
from mllm.tokenizer import fast_tokenizer, train_sentencepiece
from mllm.trainer import parameter_groups

BAR = 2e9  # bytes beyond the low-bit weights


def write_parts(folder: Path) -> None:
    """A language model and a tower of these shapes, in bfloat16, as their releases are."""
    LlamaForCausalLM(LlamaConfig(**LLM, dtype="bfloat16")).bfloat16().save_pretrained(folder / "llm")
    words = (f"word {number} of a small vocabulary" for number in range(2000))
    fast_tokenizer(train_sentencepiece(words, 400), 2048).save_pretrained(folder / "llm")
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).bfloat16().save_pretrained(folder / "tower")


def step(folder: Path, arguments: argparse.Namespace) -> dict:
    """Loads and trains one step; bytes, and seconds of the step."""
    config = MllmConfig(
        data=["-"],
        images="-",
        output="-",
        tower=str(folder / "tower"),
        llm=str(folder / "llm"),
        template="simple",
        train=["projector", "llm_lora"],
        llm_bits=arguments.bits,
        lora_rank=arguments.rank,
    )
    mllm = build_mllm(config)
    model = mllm.model.train()
    freeze(model, config.trains, torch.bfloat16)
    use_training_loss(model, choose_block(None, LLM["vocab_size"]))
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ids = torch.randint(5, 250, (arguments.rows, arguments.tokens))
    ids[:, : mllm.num_image_tokens] = model.config.image_token_id
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=labels, pixel_values=torch.randn(arguments.rows, 3, 224, 224)).loss
    loss.backward()
    optimizer.step()
    low = [p for n, p in model.named_parameters() if n.endswith("base_layer.weight")]
    states = [p.quant_state for p in low if getattr(p, "quant_state", None) is not None]
    scales = sum(t.numel() * t.element_size() for s in states for t in (s.absmax, s.state2.absmax) if t is not None)
    return {
        "loss": float(loss),
        "seconds": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loaded_bytes": loaded,
        "low_bit_bytes": sum(p.numel() * p.element_size() for p in low) + scales,
        "learned": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="of a row, 196 image tokens included")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write_parts(arguments.write)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, f"--write={folder}"], check=True)  # its memory is not the step's
        report = step(Path(folder), arguments) | {"libraries_bytes": before, "torch": torch.__version__}
    beyond = report["peak_bytes"] - report["low_bit_bytes"]
    print(f"{arguments.rows} x {arguments.tokens} tokens, rank {arguments.rank}, {report['learned'] / 1e6:.1f} M learn, cpu")
    for name, key in (
        (f"weights in {arguments.bits} bits", "low_bit_bytes"),
        ("libraries alone", "libraries_bytes"),
        ("peak until the model was ready", "loaded_bytes"),
        ("peak", "peak_bytes"),
    ):
        print(f"{name:36}{report[key] / 1e6:10.0f} MB")
    print(
        f"{'peak less those weights':36}{beyond / 1e6:10.0f} MB  bar {BAR / 1e6:.0f} MB  {'met' if beyond <= BAR else 'MISSED'}"
    )
    print(f"{'time of the step':36}{report['seconds']:10.1f} s, loss {report['loss']:.3f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(report | {"rows": arguments.rows, "tokens": arguments.tokens}, indent=2) + "\n")


if __name__ == "__main__":
    main()
