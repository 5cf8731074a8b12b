"""Shared by the tests of the trainer and what is around it."""

from importlib.util import find_spec

import pytest

# Without the trainer's dependencies only the kernels are tested.
collect_ignore_glob = [] if find_spec("diffusers") else ["test_*.py"]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder of an untrained tiny Stable Diffusion 3 pipeline."""
    from nft.worlds.shapes.tiny import build_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    build_pipeline().save_pretrained(folder)
    return str(folder)
