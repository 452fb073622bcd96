"""What one run of `scripts/finetune_mllm.py` does: a recipe is a YAML file of these fields, and each is a flag too."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from encoder.arguments import build, read_recipe
from encoder.errors import DataError
from encoder.geometry import ANYRES, MODES
from mllm.box_text import CODECS, DEFAULT_CODEC, BoxCodec
from mllm.mixture import expand, sources_of
from mllm.regions import COORDS, REGION_TOKENS
from mllm.templates import TEMPLATES
from mllm.tiles import read_grids

PARTS = ("projector", "llm", "tower", "llm_lora", "tower_lora")
PRESETS = ("nano",)
PRECISIONS = ("bf16", "fp32")
DTYPES = ("bfloat16", "float32")
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # LLaVA's name: the activation between Llava's two layers
DEFAULT_FEATURE_LAYER = -2
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
PRESET_FIELDS = ("tokenizer_data", "vocab_size", "llm_width", "llm_layers", "llm_heads", "llm_mlp_ratio", "embedding_std")
# Fields that may change between a run and its continuation.
FREE_FIELDS = {"output", "log_every", "save_every", "keep_checkpoints", "workers", "cache_folder", "resume", "report_to"}


@dataclass
class MllmConfig:
    """One training run. Paths are relative to the folder the command is started in.

    data: conversation files (LLaVA JSON or JSON lines, with or without `regions`); in a recipe also objects with path,
        images, weight or count, and importer, and in both YAML files that hold such a list, see `mllm.mixture`
    output: folder of the finished MLLM and of its checkpoints
    images: folder that the records' `image` is relative to, where an entry of data names none
    model: an MLLM folder to go on from, with its tower, tokenizer and settings; instead of tower and llm
    tower: folder of the vision tower: CLOC, CLIPModel or CLIPVisionModel
    llm: folder of any causal language model with its tokenizer
    llm_preset: a language model from scratch instead of `llm`: nano (Llama of llm_width x llm_layers)
    projector: an MLLM folder whose projector is the start, with `tower` and `llm`
    projector_type: mlp2x_gelu (LLaVA-1.5) or linear (LLaVA, Ferret: Llava's second layer is then the identity and stays it);
        none takes the MLLM folder's, or mlp2x_gelu
    train: parts that learn: projector, llm, tower; llm_lora and tower_lora: LoRA layers in that part, itself frozen
    learning_rate: peak rate of the language model or its LoRA, and of each part without a rate of its own
    projector_learning_rate: peak rate of the projector
    tower_learning_rate: peak rate of the tower or its LoRA
    lora_rank: width of a LoRA layer
    lora_alpha: its output is scaled by lora_alpha / lora_rank
    lora_dropout: share of its inputs that are dropped in training
    lora_targets: last names of the linear layers that get one, such as q_proj; none named: all but the output layer
    save_adapter: keep LoRA apart in the finished folder (peft's files, and the projector) instead of adding it to the weights;
        always so with llm_bits
    llm_bits: 4 or 8: the frozen language model's linear layers in that many bits (QLoRA), by bitsandbytes
    val_data: conversation files for a held-out loss and accuracy of tokens, measured every val_every steps
    val_every: steps between two such measurements
    tokenizer_data: conversation files that the preset's tokenizer is trained on; data if empty. Name later domains too
    vocab_size: pieces of the preset's tokenizer, at most
    llm_width: width of the preset's language model
    llm_layers: its layers
    llm_heads: its attention heads
    llm_mlp_ratio: its MLP width as a multiple of its width
    embedding_std: standard deviation of the preset's token embeddings and, through the projector, of image tokens;
        at Llama's 0.02 a small model from scratch never learned to read positions, at 0.5 it did
    feature_layer: which of the tower's hidden states is projected, -1 the last, -2 the one before; several stand side by
        side, as in Llava's vision_feature_layer; none takes the MLLM folder's, or -2
    geometry: how a picture becomes the square input, pad, pad_first (LLaVA-1.5's own pad) or squash, or anyres: squash, and
        tiles of it beside it (LLaVA-NeXT's, a stock llava_next); none takes the tower's
    tile_grids: with anyres, rows x columns of tiles that a picture may be cut into, such as 1x2 2x1; none named: LLaVA-NeXT's
        1x2 2x1 2x2 3x1 1x3
    codec: how boxes are written: int1000, float2, float3 or loc_tokens (docs/training.md); none takes the MLLM folder's,
        or int1000
    region_tokens: how a region in a question enters beside its coordinates: coords (not at all: a stock Llava), prompter
        (CLOC's region embedding as one more token) or pooling (the mean of the tower's patches under it, for any tower); none
        takes the MLLM folder's, or coords
    prompter: CLOC folder whose Prompter reads the regions; none: the tower's own folder
    template: auto (the tokenizer's own, or ours of the same text with marks), or a name of mllm/templates.py
    max_length: longest row in tokens, picture included; longer conversations are cut, and counted
    share_pictures: conversations about one picture share a row, up to max_length; each sees the picture and itself alone.
        The same losses and gradients as in rows of their own, and the picture is run once
    pack: different conversations share a row, up to max_length, each seeing itself alone: no padding, the same losses and
        gradients. After share_pictures where both are on
    batch_size: rows per process and step; a row is a conversation, all those of a picture with share_pictures, or as many
        as fit with pack
    gradient_accumulation: batches per optimizer step
    epochs: passes over the data
    max_steps: optimizer steps; 0 leaves it to epochs
    warmup: share of the steps in which the rate rises
    schedule: cosine, linear or constant
    weight_decay: of matrices
    beta2: AdamW's second-moment decay
    max_grad_norm: gradient norm is clipped to this
    group_by_length: batches of rows of like length
    seed: of initial weights and data order
    precision: bf16 (autocast; under DeepSpeed bf16 weights with a float32 master copy) or fp32
    zero: DeepSpeed configuration file; none trains without DeepSpeed
    loss_block: supervised tokens whose logits are in memory at once; 0 has all logits of a batch; none takes as many
        as make 32 million logits where the vocabulary is above 8192, else 0
    gradient_checkpointing: recompute activations in the backward pass
    attention: transformers' attention: sdpa or eager
    cache_features: run the frozen tower once per picture and keep its features on disk
    cache_folder: where features are kept, shared between runs on the same tower and pictures; none: in output
    workers: processes that read pictures; 0 reads in the training process
    log_every: steps between two log lines
    save_every: steps between two checkpoints; 0 keeps none
    keep_checkpoints: how many of the last checkpoints are kept
    save_dtype: number format of the finished weights; frozen parts are rounded to it before training
    resume: auto goes on from the last complete checkpoint of the same run, never starts over
    report_to: tensorboard, wandb or none
    """

    data: list[str | dict]
    output: str
    images: str | None = None
    model: str | None = None
    tower: str | None = None
    llm: str | None = None
    llm_preset: str | None = None
    projector: str | None = None
    projector_type: str | None = None
    train: list[str] = field(default_factory=lambda: ["projector", "llm"])
    learning_rate: float = 1e-3
    projector_learning_rate: float | None = None
    tower_learning_rate: float | None = None
    lora_rank: int = 128
    lora_alpha: float = 256.0
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=list)
    save_adapter: bool = False
    llm_bits: int | None = None
    val_data: list[str | dict] = field(default_factory=list)
    val_every: int = 500
    tokenizer_data: list[str | dict] = field(default_factory=list)
    vocab_size: int = 1024
    llm_width: int = 192
    llm_layers: int = 4
    llm_heads: int = 6
    llm_mlp_ratio: float = 3.0
    embedding_std: float = 0.5
    feature_layer: int | list[int] | None = None
    geometry: str | None = None
    tile_grids: list[str] = field(default_factory=list)
    codec: str | None = None
    region_tokens: str | None = None
    prompter: str | None = None
    template: str = "auto"
    max_length: int = 2048
    share_pictures: bool = False
    pack: bool = False
    batch_size: int = 16
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    seed: int = 0
    precision: str = "bf16"
    zero: str | None = None
    loss_block: int | None = None
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    cache_features: bool = False
    cache_folder: str | None = None
    workers: int = 0
    log_every: int = 50
    save_every: int = 500
    keep_checkpoints: int = 2
    save_dtype: str = "bfloat16"
    resume: str = "auto"
    report_to: str = "tensorboard"

    def __post_init__(self):
        for name in ("data", "train", "val_data", "tokenizer_data", "lora_targets", "tile_grids"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in ("data", "val_data", "tokenizer_data"):
            setattr(self, name, expand(getattr(self, name)))  # what a YAML file says belongs to the run's identity
            sources_of(getattr(self, name))
        self._check_words()
        if not self.model:
            self.codec = self.codec or DEFAULT_CODEC
            self.projector_type = self.projector_type or "mlp2x_gelu"
        self._check_parts()
        self._check_numbers()

    def _check_words(self):
        words = {
            "llm_preset": PRESETS,
            "geometry": (*MODES, ANYRES),
            "codec": CODECS,
            "region_tokens": REGION_TOKENS,
            "template": ("auto", *TEMPLATES),
            "projector_type": tuple(PROJECTORS),
            "schedule": ("cosine", "linear", "constant"),
            "precision": PRECISIONS,
            "attention": ("sdpa", "eager"),
            "save_dtype": DTYPES,
            "resume": ("auto", "never"),
            "report_to": ("tensorboard", "wandb", "none"),
        }
        for name, allowed in words.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise DataError(f"{name} is '{value}'; choose one of {', '.join(allowed)}")
        for part in self.train:
            if part not in PARTS:
                raise DataError(f"train names '{part}'; choose from {', '.join(PARTS)}")
        if not self.train or not self.data:
            raise DataError(f"{'train' if not self.train else 'data'} is empty, so there is nothing to learn; name one")

    def _check_parts(self):
        starts = {"tower": self.tower, "llm": self.llm, "llm_preset": self.llm_preset, "projector": self.projector}
        given = [name for name, value in starts.items() if value]
        if self.model and given:
            raise DataError(f"model and {given[0]} are both given, but an MLLM folder brings its own; drop one of the two")
        if not self.model:
            if not self.tower:
                raise DataError("neither model nor tower is given; name an MLLM folder, or a tower with an llm")
            if bool(self.llm) == bool(self.llm_preset):
                both = "both" if self.llm else "neither of them"
                raise DataError(f"llm and llm_preset: {both} given; name a language model's folder or a preset")
        if self.llm_preset and "llm" not in self.train:
            raise DataError("llm_preset starts from random weights, but train lacks llm; add it")
        if not self.model and "llm" not in self.train and BoxCodec(self.codec).tokens:
            raise DataError(
                f"codec {self.codec} gives the language model new tokens, but train lacks llm, so none would be learned; "
                "add it, or take another codec"
            )
        if self.prompter and self.region_tokens != "prompter":
            raise DataError(
                "prompter is given, but region_tokens is not prompter, so nothing would read it; set that, or drop it"
            )
        if self.new_regions and not self.model and "projector" not in self.train:
            raise DataError(f"region_tokens {self.region_tokens} has a projector that must be learned; add projector to train")
        if self.cache_features and (learns := self.trains & {"tower", "tower_lora"}):
            raise DataError(
                f"cache_features keeps a frozen tower's features, but train names {learns.pop()}; drop one of the two"
            )
        self._check_adapters()
        self._check_unread(LORA_FIELDS, self.uses_lora, "train names neither llm_lora nor tower_lora")
        self._check_unread(PRESET_FIELDS, self.llm_preset, "llm_preset is not given")
        if self.joins_rows and self.attention != "sdpa":
            raise DataError(f"{self.joins_rows} needs a mask that attention {self.attention} does not take; choose sdpa")
        if self.pack and self.group_by_length:
            raise DataError("pack makes rows of one length, so that group_by_length has nothing to do; drop one of the two")
        rates = {"projector": self.projector_learning_rate, "tower": self.tower_learning_rate}
        for part, rate in rates.items():
            if rate is not None and not self.trains & {part, f"{part}_lora"}:
                raise DataError(f"{part}_learning_rate is given, but train lacks {part}; drop one or add the other")
        if self.geometry == "center_crop":
            raise DataError("geometry 'center_crop' cuts boxes off; choose pad, squash or anyres")
        if self.tile_grids and not self.model and self.geometry != ANYRES:
            raise DataError("tile_grids is given, but geometry is not anyres, so nothing would read it; set that, or drop it")
        read_grids(self.tile_grids)

    def _check_unread(self, names: tuple[str, ...], read: object, why: str):
        """Refuses fields that were set and that nothing reads."""
        for name in names if not read else ():
            if (value := getattr(self, name)) not in (self.__dataclass_fields__[name].default, []):
                raise DataError(f"{name} is {value}, but {why}, so nothing would read it; set that, or drop {name}")

    def _check_adapters(self):
        for part in ("llm", "tower"):
            if {part, f"{part}_lora"} <= self.trains:
                raise DataError(f"train names {part} and {part}_lora, which keeps {part} itself frozen; drop one of the two")
        if self.llm_bits not in (None, 4, 8):
            raise DataError(f"llm_bits is {self.llm_bits}; give 4 or 8, or leave it out")
        if self.llm_bits and "llm" in self.train:
            raise DataError(
                f"llm_bits {self.llm_bits} is for a frozen language model, but train names llm; name llm_lora instead"
            )
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise DataError(
                f"lora_rank {self.lora_rank}, lora_alpha {self.lora_alpha}, lora_dropout {self.lora_dropout}: "
                "give a rank of 1 or more, an alpha above 0 and a dropout in [0, 1)"
            )
        if self.save_adapter and not self.uses_lora:
            raise DataError("save_adapter is true, but train names neither llm_lora nor tower_lora; there is no adapter to save")
        if self.save_adapter and self.llm_preset:
            raise DataError(
                "save_adapter is true, but no folder holds the random weights that llm_preset starts from; drop save_adapter"
            )

    def _check_numbers(self):
        at_least_one = ("batch_size", "gradient_accumulation", "log_every", "val_every", "max_length", "llm_layers")
        for name in (*at_least_one, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("max_steps", "save_every", "workers", "weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise DataError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.warmup >= 1:
            raise DataError(f"warmup is {self.warmup}; give a share of the steps, below 1")
        if self.loss_block is not None and self.loss_block < 0:
            raise DataError(f"loss_block is {self.loss_block}; give the tokens of a block, or 0 for no blocks")
        if self.llm_width % (2 * self.llm_heads):
            raise DataError(
                f"llm_width {self.llm_width} is not an even multiple of llm_heads {self.llm_heads}; rotary heads need it"
            )
        if self.learning_rate <= 0 or (self.epochs <= 0 and not self.max_steps):
            raise DataError("learning_rate and epochs (or max_steps) must be above 0; nothing is learned otherwise")

    @property
    def joins_rows(self) -> str | None:
        """The field, if any, that puts several conversations into a row."""
        return "pack" if self.pack else "share_pictures" if self.share_pictures else None

    @property
    def new_regions(self) -> bool:
        """Whether region tokens are asked for."""
        return self.region_tokens not in (None, COORDS)

    @property
    def trains(self) -> set[str]:
        return set(self.train)

    @property
    def uses_lora(self) -> bool:
        return bool(self.trains & {"llm_lora", "tower_lora"})

    @property
    def saves_adapter(self) -> bool:
        return self.save_adapter or bool(self.llm_bits)

    def identity(self) -> dict:
        """The fields that make this run this run: a checkpoint goes on only under the same ones."""
        return {name: value for name, value in vars(self).items() if name not in FREE_FIELDS}


def layers_of(feature_layer: int | list[int]) -> list[int]:
    return [feature_layer] if isinstance(feature_layer, int) else feature_layer


def load_config(recipe: str | Path | None, flags: dict) -> MllmConfig:
    """A recipe's fields, overridden by flags; an unknown field is refused with its nearest valid name."""
    values = read_recipe(recipe, set(MllmConfig.__dataclass_fields__)) if recipe else {}
    return build(MllmConfig, values | flags)


def check_identity(output: Path, config: MllmConfig) -> None:
    """Refuses to go on from checkpoints in `output` that another configuration made, naming the field."""
    path = output / "run.json"
    if not path.is_file():
        return
    saved = json.loads(path.read_text())
    for name, value in config.identity().items():
        before = saved.get(name, getattr(MllmConfig, name, value))  # a field that came later had its default
        if value is None and name in ("codec", "projector_type"):  # the MLLM folder's, which is the same one
            continue
        if before != value and (name, before, value) != ("projector_type", None, "mlp2x_gelu"):  # the field came later
            raise DataError(
                f"{path}: the checkpoints here were made with {name} = {before}, this run has {value}; "
                f"choose another output, or pass --resume never to start over"
            )
