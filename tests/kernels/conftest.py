"""Every op is tested in every backend that runs here: Triton on the GPU, or else in its interpreter."""

import importlib.util
import os

import pytest
import torch

from nft_kernels import backends

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which is when the backend is first loaded.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def device(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def available(request):
    if request.param != "reference":
        reason = backends.load(request.param).why_not(torch.empty(0, device=device(request.param)))
        if reason:
            pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session", params=["reference", "native", "triton"])
def backend(request):
    return available(request)


@pytest.fixture(scope="session", params=["native", "triton"])
def kernels(request):
    """The backends other than the reference."""
    return available(request)


@pytest.fixture(autouse=True, scope="session")
def patched_once():
    """In Triton's interpreter every call of an inner function looks through the whole language for what to patch, which
    takes two thirds of its time, and finds that its caller has patched it."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(function):
        modules = (x for x in function.__globals__.values() if x is tl or x is tl.core)
        return patch(function) if any(tl.core.is_builtin(module.load) for module in modules) else None

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_device(request):
    parameters = getattr(request.node, "callspec", None)
    names = parameters.params if parameters else {}
    with torch.device(device(names.get("backend", names.get("kernels")))):
        yield
