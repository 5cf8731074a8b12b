"""A GPU that is not there, as a plugin of pytest: ``python -m pytest -p pretend_gpu tests/nft/test_gpu.py``.

Tensors on it live in the host's memory and compute there, but an operation that also takes one of the host's fails as
it would on a GPU. A CUDA graph records operations and repeats them on the same memory, and fails on those that a GPU
could not record. What it cannot show: speed, rounding, races, and kernels, of which only the reference runs.
"""

import ctypes
import os
from contextlib import contextmanager, nullcontext

os.environ["NFT_KERNELS_BACKEND"] = "reference"
# Before PyTorch has asked whether there are GPUs.
ctypes.CDLL(os.environ["PRETEND_GPU"])

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from nft_kernels.models import _lora  # noqa: E402

aten = torch.ops.aten
GPU = torch.device("cuda:0")
# That take indices of the host too, if not for tensors of the host.
INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default)  # fmt: skip
# For which a GPU is waited for.
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten._unique2.default)
recording = None


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, of one of the host."""

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=GPU
        )

    def __init__(self, host):
        self.host = host

    def __repr__(self, **_):
        return f"OnGPU({self.host})"

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        is_parameter = isinstance(self, torch.nn.Parameter)
        return torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy.requires_grad_(self.requires_grad)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch._C.TensorBase.data.__set__(self, value)
        self.host = value.host

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def to_host(x):
    return x.host if isinstance(x, OnGPU) else x


def compute(operation, args, kwargs):
    """On the host, and in the graph that is being recorded if there is one."""
    result = operation(*args, **kwargs)
    if recording is not None:
        recording.append((operation, args, kwargs, result))
    return result


def run(operation, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here, elsewhere = [], []
    for x in tensors:
        (here if isinstance(x, OnGPU) else elsewhere).append(x)
    device = kwargs.get("device")
    if not here and not on_gpu(device):
        return operation(*args, **kwargs)
    if here and operation is aten._fused_sdp_choice.default:
        # The one of the host goes by another name.
        return 0
    moved = operation in (aten._to_copy.default, aten.copy_.default)
    if moved and recording is not None and (elsewhere or (device is not None and not on_gpu(device))):
        raise RuntimeError(f"{operation} between the host and the GPU while a graph is recorded")
    if operation in READS and recording is not None:
        raise RuntimeError(f"{operation} while a graph is recorded")
    if here and not moved:
        if operation in INDEXED:
            written = args[2:3] if operation not in INDEXED[:2] else ()
            elsewhere = [x for x in (args[0], *written) if not isinstance(x, OnGPU)]
        wrong = [tuple(x.shape) for x in elsewhere if x.ndim]
        if wrong or (operation._schema.is_mutable and any(x is args[0] for x in elsewhere)):
            raise RuntimeError(f"{operation}: tensors {wrong} are on the host, and {len(here)} others on the GPU")
    stays = bool(here) if device is None else on_gpu(device)
    given = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    result = compute(operation, *tree_map(to_host, (args, given)))
    if operation is aten.copy_.default:
        return args[0]
    known = {id(x.host): x for x in here}

    def placed(y):
        if id(y) in known or not isinstance(y, torch.Tensor):
            return known.get(id(y), y)
        return OnGPU(y) if stays else y

    return tree_map(placed, result)


class Operations(TorchDispatchMode):
    """Those that make tensors."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What PyTorch does to a tensor before any operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and on_gpu(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": None}).to(GPU)
        if function is torch.Tensor.cuda:
            return args[0].to(GPU)
        if args and isinstance(args[0], OnGPU):
            if function is torch.Tensor.new_tensor:
                return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype), device=GPU)
            if function is torch.Tensor.tolist:
                return args[0].cpu().tolist()
            if function is torch.Tensor.data_ptr:
                return args[0].host.data_ptr()
            if function in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("a tensor on the GPU is no array")
            if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                parts = args[1] if isinstance(args[1], tuple) else (args[1],)
                index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
                args = (args[0], index, *args[2:])
        return function(*args, **kwargs)


class Graph:
    """What stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.steps = []

    def pool(self):
        return None

    def replay(self):
        for operation, args, kwargs, result in self.steps:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def record(graph, **_):
    global recording
    recording = graph.steps
    try:
        yield
    finally:
        recording = None


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def instead(module, name):
    """Let a function have tensors of the host."""
    function = getattr(module, name)
    setattr(module, name, lambda x, *args, **kwargs: function(tree_map(to_host, x), *args, **kwargs))


def to_device(module, *args, plain=torch.nn.Module.to, **kwargs):
    # A parameter cannot be given data of another class.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return plain(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def load_file(path, device="cpu", plain=safetensors.torch.load_file):
    return {name: x.to(device) for name, x in plain(path).items()}


def pytest_configure():
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "none",
        "get_device_capability": lambda *_: (9, 0),
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
        "current_stream": Stream,
        "Stream": Stream,
        "stream": nullcontext,
        "device_of": nullcontext,
        "CUDAGraph": Graph,
        "graph": record,
    }.items():
        setattr(torch.cuda, name, value)
    # The fast path leaves to PyTorch what is not of its classes.
    _lora.type = lambda x: torch.nn.Parameter if isinstance(x, OnGPU) else type(x)
    torch.nn.Module.to = to_device
    torch.nn.Module.cuda = lambda module: module.to(GPU)
    for name in ("save", "save_file"):
        instead(safetensors.torch, name)
    instead(torch, "save")
    safetensors.torch.load_file = load_file
    Operations().__enter__()
    Functions().__enter__()
