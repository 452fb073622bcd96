"""`grounding.json`: what an MLLM's folder says beside its stock files, and an evaluation has to repeat exactly."""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from encoder.errors import DataError
from encoder.geometry import ANYRES
from mllm.image_input import ImageInput
from mllm.region_tokens import RegionLlavaConfig, RegionLlavaNextConfig
from mllm.regions import COORDS, REGION_TOKENS

SETTINGS_FILE = "grounding.json"


@dataclass
class MllmSettings:
    """What `grounding.json` holds.

    codec: how boxes are written; image: geometry, size and normalisation; feature_layer: the tower's projected layer(s)
    template: name of the chat template (`own`: the language model's)
    tower_path: the folder the tower came from; tower_hash: sha256 of its weights as saved here
    dtype: number format of the saved weights; trained: parts that learned, run by run; regions: how a region enters, see
        `mllm.region_tokens`
    base: of an adapter folder, the recipe's fields that name what it was trained on; llm_bits: the language model's, there
    versions: of the libraries that wrote it
    """

    codec: str
    image: ImageInput
    feature_layer: int | list[int]
    template: str
    tower_path: str
    tower_hash: str = ""
    dtype: str = "float32"
    trained: list[list[str]] = field(default_factory=list)
    regions: str = COORDS
    base: dict = field(default_factory=dict)
    llm_bits: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """What config.json says of such an MLLM."""
        tiles = self.image.mode == ANYRES
        if self.regions != COORDS:
            return (RegionLlavaNextConfig if tiles else RegionLlavaConfig).model_type
        return "llava_next" if tiles else "llava"

    def write(self, folder: Path) -> None:
        values = {**vars(self), "image": self.image.as_dict()}
        values["versions"] = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
        (folder / SETTINGS_FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "MllmSettings":
        path = Path(folder) / SETTINGS_FILE
        if not Path(folder).is_dir():
            raise DataError(f"MLLM folder {folder} does not exist; make it with scripts/finetune_mllm.py")
        if not path.is_file():
            raise DataError(f"{path} does not exist, so it is unknown how boxes are written; name a folder of finetune_mllm.py")
        try:
            values = json.loads(path.read_text())
            settings = cls(**{**values, "image": ImageInput.from_dict(values["image"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not the settings of an MLLM ({error}); train the folder again") from error
        if settings.regions not in REGION_TOKENS:
            known = ", ".join(REGION_TOKENS)
            raise DataError(f"{path}: regions is '{settings.regions}', this version reads {known}; use a newer version")
        return settings
