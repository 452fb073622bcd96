"""What a CPU cannot show: the same losses, gradients and answers on a CUDA device, and training there under the launcher."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mllm_fixtures import recipe, write_clip, write_conversations
from PIL import Image

from encoder.contrastive import contrastive_loss
from encoder.losses import LossConfig, cloc_losses
from encoder.predictor import RegionPredictor
from mllm.config import MllmConfig
from mllm.generation import GroundingModel
from mllm.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; what is tested here exists only on one"),
]
ROOT = Path(__file__).parents[1]
STEPS = 12


def loss_and_gradients(model, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A CLOC's loss on one small batch, and its gradients, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype),
        "input_ids": torch.tensor([[5, 6, 1], [7, 8, 1], [9, 5, 1], [8, 6, 1]]),
        "boxes": torch.rand(5, 2, 2, generator=generator).sort(dim=1).values.reshape(-1, 4).to(dtype),
        "image_index": torch.tensor([0, 0, 1, 3, 3]),
        "region_input_ids": torch.tensor([[9, 1], [10, 1], [11, 1], [12, 1], [13, 1]]),
    }
    batch = {key: value.to(device) for key, value in batch.items()}
    model = copy.deepcopy(model).to(device, dtype).train()
    losses, _ = cloc_losses(model(**batch), batch["boxes"], batch["image_index"], LossConfig(similar_text_threshold=None))
    loss = sum(losses.values())
    loss.backward()
    gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu().double(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_loss_and_gradients_are_the_cpus(tiny_model, attention):
    tiny_model.set_attn_implementation(attention)
    loss, gradients = loss_and_gradients(tiny_model, "cuda", torch.float32)
    expected, expected_gradients = loss_and_gradients(tiny_model, "cpu", torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_bfloat16_gradients_point_where_the_exact_ones_do(tiny_model):
    loss, gradients = loss_and_gradients(tiny_model, "cuda", torch.bfloat16)
    expected, expected_gradients = loss_and_gradients(tiny_model, "cpu", torch.float64)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    ours, exact = (torch.cat([each[name].flatten() for name in expected_gradients]) for each in (gradients, expected_gradients))
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.98


@pytest.mark.parametrize("block_size", [64, 1000])
def test_contrastive_blocks_equal_the_float64_matrix(block_size):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(300, 64, generator=generator, dtype=torch.float64)
    texts[:50] = texts[200:250]
    leaves = [texts + torch.randn(300, 64, generator=generator, dtype=torch.float64), texts, torch.tensor(14.0).double()]
    ours = [leaf.float().cuda().requires_grad_() for leaf in leaves]
    contrastive_loss(*ours, 0.9, block_size=block_size)[0].backward()
    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    a, b = (torch.nn.functional.normalize(leaf, dim=-1) for leaf in exact[:2])
    similar = (b @ b.T > 0.9) & ~torch.eye(300, dtype=torch.bool)
    logits = (exact[2] * a @ b.T).masked_fill(similar, -torch.inf)
    targets = torch.arange(300)
    cross_entropy = torch.nn.functional.cross_entropy
    ((cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2).backward()
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.cpu().double(), reference.grad, rtol=1e-4, atol=1e-7)


def test_predictor_gives_the_cpus_embeddings_and_boxes(tiny_folder, painted):
    image, record = painted(0)
    boxes = [region["box"] for region in record["regions"]]
    results = []
    for device in ("cpu", "cuda"):
        predictor = RegionPredictor.from_pretrained(tiny_folder, device=device)
        predictor.set_image(image)
        results.append((predictor.embed_boxes(boxes), *predictor.ground(["red square", "small blue bar"])))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-3)


def launched(script: str, arguments: list[str], gpu: bool) -> str:
    """Runs a script under `deepspeed` on one GPU, or plainly on the CPU alone; its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(port)] if gpu else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def pretrained(shards: Path, output: Path, gpu: bool, *flags: str) -> list[float]:
    """The losses of a short run of pretrain_encoder.py."""
    fixed = "--preset tiny --vocab_size 96 --batch_size 8 --warmup_steps 2 --learning_rate 3e-4 --log_every 1 --save_every 6"
    arguments = [*fixed.split(), "--similar_text_threshold", "0.999", "--steps", str(STEPS)]
    launched("scripts/pretrain_encoder.py", [*arguments, "--shards", str(shards), "--output", str(output), *flags], gpu)
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_the_cpu(region_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return pretrained(region_shards, folder / "run", False, "--precision", "fp32", "--zero_stage", "0")


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ("--precision fp32 --zero_stage 0", 1e-3),
        ("--precision bf16 --zero_stage 0 --ema_decay 0.9", 5e-2),
        ("--precision bf16 --zero_stage 1", 5e-2),
        ("--precision bf16 --zero_stage 2 --compile true --ema_decay 0.9", 5e-2),
        ("--precision bf16 --zero_stage 3 --gradient_checkpointing true --micro_batch_size 4", 5e-2),
    ],
)
def test_pretraining_under_the_launcher_has_the_cpus_losses(region_shards, on_the_cpu, tmp_path, flags, tolerance):
    losses = pretrained(region_shards, tmp_path / "run", True, *flags.split())
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, on_the_cpu, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_conversations(folder, 8, text_only=2)
    write_clip(folder / "clip")
    return folder


def finetuned(folder: Path, name: str, gpu: bool, **fields) -> list[float]:
    """The losses of a short run of finetune_mllm.py."""
    values = recipe(folder, output=str(folder / name), max_steps=6, save_every=0, warmup=0.0, **fields)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    launched("scripts/finetune_mllm.py", [str(folder / f"{name}.yaml")], gpu)
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finetuned_on_the_cpu(conversations):
    return finetuned(conversations, "plain", False)


@pytest.mark.parametrize("zero", ["zero2", "zero3", "zero3_offload"])
def test_finetuning_under_the_launcher_has_the_cpus_losses(conversations, finetuned_on_the_cpu, zero):
    losses = finetuned(conversations, zero, True, zero=f"scripts/deepspeed/{zero}.json", precision="bf16")
    assert len(losses) == 6
    torch.testing.assert_close(losses, finetuned_on_the_cpu, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_trains_and_answers(conversations, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = train(MllmConfig(**recipe(conversations, output=str(tmp_path / "base"), max_steps=2, save_every=0)))
    fields = {"train": ["projector", "llm_lora"], "llm_bits": bits, "lora_rank": 4, "precision": "bf16"}
    model = train(MllmConfig(**recipe(conversations, model=str(base), output=str(tmp_path / "low"), **fields)))
    answerer = GroundingModel.from_pretrained(model, device="cuda")
    picture = Image.open(next((conversations / "images").glob("*.png"))).convert("RGB")
    assert answerer.generate([picture], ["Where is the red square?"], [[]], max_new_tokens=8, progress=False)[0] is not None


def test_greedy_answers_do_not_depend_on_the_batch(conversations):
    """The shipped MLLM in float32: the same answers one by one and eight at a time."""
    answerer = GroundingModel.from_pretrained(ROOT / "weights" / "mllm_cloc", device="cuda", dtype=torch.float32)
    pictures = [Image.open(path).convert("RGB") for path in sorted((conversations / "images").glob("*.png"))]
    questions = ["Where is the square?", "What is <region>?", "Where is the square on the left?", "What is <region:0>?"] * 2
    regions = [[], [(1, 2, 20, 30)]] * 4
    one, eight = (
        answerer.generate(pictures[:8], questions, regions, batch_size=size, max_new_tokens=24, progress=False) for size in (1, 8)
    )
    assert one == eight and len(set(one)) > 1
