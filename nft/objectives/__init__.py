"""Objectives: what a picture's advantage becomes, and the loss it weighs. To add one, write a module like ``rwr``."""

from . import awm, grpo, nft, positive, rwr, sft
from .base import OBJECTIVES, Batch, Objective, Step, unread

__all__ = ["OBJECTIVES", "Batch", "Objective", "Step", "awm", "grpo", "nft", "positive", "rwr", "sft", "unread"]
