"""DiffusionNFT training for diffusers pipelines. Start with ``nft train --config shapes``."""
