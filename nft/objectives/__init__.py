"""Objectives: what a picture's advantage becomes, and the loss it weighs. To add one, write a module like ``rwr``."""

from . import nft, rwr, sft
from .base import OBJECTIVES, Batch, Objective

__all__ = ["OBJECTIVES", "Batch", "Objective", "nft", "rwr", "sft"]
