"""DiffusionNFT training for diffusers pipelines. Start with ``nft train --config shapes``."""

import os
from contextlib import suppress


def _sum_rows_alike() -> None:
    """Have Intel's MKL, before its first product, sum every row in the same order, however many rows there are: a
    picture must not depend on its batch. On AMD's it was seen to do so untold, and is left alone."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        processor = file.read(4096)
        if "GenuineIntel" in processor and " avx2 " in processor:
            os.environ.setdefault("MKL_CBWR", f"{'AVX512' if ' avx512bw ' in processor else 'AVX2'},STRICT")


_sum_rows_alike()
