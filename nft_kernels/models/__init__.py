"""Fused paths for diffusers' transformers, one file for each; nothing here is imported by ``import nft_kernels``."""
