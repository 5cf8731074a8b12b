"""Read before any test imports torch or Hugging Face's libraries."""

import os

import pytest

# It tells MKL how to sum, which is too late after the import of diffusers under torch 2.6.
import nft  # noqa: F401

# What is not on disk is to be refused at once, and not asked for again and again where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and a thread that waits for others must not keep one busy.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file goes to one worker, whose fixtures are expensive, in the order of collection: the longest ones have few
    tests and would come last. ``--dist`` chooses another scheduler."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Tests that fork come first: a fork cannot use autograd once other tests, or a GPU, have started its threads."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
