"""Fused kernels for DiffusionNFT (Zheng et al., arXiv 2509.16117). Public are these and ``nft_kernels.models``.

An op has the same name all the way out: ``reference`` holds its mathematics in plain PyTorch, ``ops`` what callers give
and how it is differentiated, ``backends`` its kernels, in C++ and CUDA (``csrc``) and in Triton.
"""

from . import solvers
from .loss import NFTLoss, nft_loss_from_rewards
from .ops.add_noise import add_noise
from .ops.advantages import group_advantages, optimality_probability
from .ops.nft_loss import NFTLossOutput, nft_loss
from .ops.solver_step import SolverStep, solver_step

__all__ = [
    "NFTLoss",
    "NFTLossOutput",
    "SolverStep",
    "add_noise",
    "group_advantages",
    "nft_loss",
    "nft_loss_from_rewards",
    "optimality_probability",
    "solver_step",
    "solvers",
]
__version__ = "0.1.0"
