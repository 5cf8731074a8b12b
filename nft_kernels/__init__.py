"""Fused kernels for DiffusionNFT (Zheng et al., arXiv 2509.16117). This is the whole public surface."""

from .ops.add_noise import add_noise
from .ops.nft_loss import NFTLossOutput, nft_loss
from .reference.advantages import group_advantages, optimality_probability

__all__ = ["NFTLossOutput", "add_noise", "group_advantages", "nft_loss", "optimality_probability"]
__version__ = "0.1.0"
