"""CLOC's encoder: CLIP with promptable region embeddings. Importing it teaches transformers' Auto classes the CLOC folders."""

from encoder.config import ClocConfig, ClocSiglipConfig
from encoder.model import ClocModel
from encoder.predictor import RegionPredictor
from encoder.processor import ClocProcessor
from encoder.siglip import ClocSiglipModel

__all__ = ["ClocConfig", "ClocModel", "ClocProcessor", "ClocSiglipConfig", "ClocSiglipModel", "RegionPredictor"]
