"""Results on the CPU in memory that earlier results had."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nft_kernels import add_noise
from nft_kernels.backends import _memory, native
from nft_kernels.backends._memory import empty_like

LARGE = 2**18  # float32 elements, 1 MiB


pytestmark = pytest.mark.skipif(native._C is None, reason="the compiled module is not installed")


@pytest.fixture(autouse=True)
def no_memory() -> None:
    _memory.release()


def kept() -> int:
    return _memory.sizes()[1]


def test_memory_is_used_again_once_the_last_view_of_it_is_gone() -> None:
    x = torch.zeros(LARGE)
    first = empty_like(x)
    view, address = first[5:].view(torch.int32), first.data_ptr()
    del first
    gc.collect()
    second = empty_like(x)
    assert second.data_ptr() != address
    del view
    assert empty_like(x.double()).data_ptr() != address, "memory of another size was taken"
    assert empty_like(x).data_ptr() == address


def test_what_the_caller_holds_is_not_written_again() -> None:
    x0, t = torch.randn(2, LARGE), torch.tensor([0.25, 0.75])
    results, expected = [], []
    for seed in range(4):
        noise = torch.randn(2, LARGE, generator=torch.Generator().manual_seed(seed))
        results.append(add_noise(x0, t, noise=noise))
        expected.append((1 - t[:, None]) * x0 + t[:, None] * noise)
        add_noise(x0, t, noise=noise)
    for x_t, same in zip(results, expected, strict=True):
        torch.testing.assert_close(x_t, same)


def test_a_gradient_outlives_the_tensor_it_belonged_to() -> None:
    v = torch.randn(LARGE, requires_grad=True)
    v.grad = empty_like(v.detach()).fill_(3)
    array = v.grad.numpy()
    v.grad = None
    empty_like(v.detach()).fill_(4)
    assert (array == 3).all()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(LARGE - 1), torch.zeros(LARGE, 2).T, torch.zeros(LARGE, device="meta"), torch.zeros(LARGE, 2)[:, 0]],
    ids=["small", "transposed", "meta", "strided"],
)
def test_other_tensors_are_torchs_own(x: Tensor) -> None:
    like, expected = empty_like(x, torch.bfloat16), torch.empty_like(x, dtype=torch.bfloat16)
    assert (like.shape, like.stride(), like.dtype, like.device) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
        expected.device,
    )
    assert not kept()


def test_a_tensor_without_values_is_lent_no_memory() -> None:
    """torch.compile traces with such, which say that they are on the CPU."""
    with FakeTensorMode():
        assert isinstance(empty_like(torch.empty(LARGE)), FakeTensor)
        assert isinstance(_memory.new_empty(torch.empty(LARGE), (LARGE, 2)), FakeTensor)
    assert not kept()


def test_no_more_is_kept_than_stated() -> None:
    x, before = torch.empty(2**24), _memory.sizes()[0]
    size = 4 * len(x)
    held = [empty_like(x) for _ in range(6)]
    addresses = [y.data_ptr() for y in held]
    assert _memory.sizes() == (before + 6 * size, 0)
    while held:
        del held[0]
    assert _memory.sizes() == (before, 4 * size), "256 MiB"
    again = [empty_like(x) for _ in range(4)]
    assert [y.data_ptr() for y in again] == addresses[:1:-1], "the newest is the likeliest to be in cache"
    assert _memory.sizes() == (before + 4 * size, 0)
    del again
    _memory.release()
    assert _memory.sizes() == (before, 0)


def test_memory_that_nobody_takes_over_is_not_lost() -> None:
    before = _memory.sizes()[0]
    capsule = native._C.lend_memory((LARGE,), 0)
    assert _memory.sizes() == (before + 4 * LARGE, 0)
    del capsule
    assert _memory.sizes() == (before, 4 * LARGE)


def test_more_than_there_is_raises() -> None:
    with pytest.raises(MemoryError):
        native._C.lend_memory((2**50,), 0)
    assert empty_like(torch.empty(LARGE)).numel() == LARGE


@pytest.mark.parametrize("hold", [Tensor.untyped_storage, Tensor.numpy, Tensor.detach], ids=lambda hold: hold.__name__)
def test_whatever_shares_the_memory_keeps_it(hold: Callable[[Tensor], object]) -> None:
    x = torch.zeros(LARGE)
    first = empty_like(x)
    held, address = hold(first), first.data_ptr()
    del first
    gc.collect()
    assert empty_like(x).data_ptr() != address
    del held
    gc.collect()
    assert empty_like(x).data_ptr() == address


def test_memory_shared_with_other_processes_is_not_taken() -> None:
    x = torch.zeros(LARGE)
    shared = empty_like(x).share_memory_()
    held, address = _memory.sizes()[0], shared.data_ptr()
    del shared
    assert _memory.sizes()[0] == held
    assert empty_like(x).data_ptr() != address


def test_threads_do_not_share_memory() -> None:
    x, wrong = torch.zeros(LARGE), []

    def work(i: int) -> None:
        for _ in range(200):
            y = empty_like(x).fill_(i)
            if y[0] != i or y[-1] != i:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_large_result_can_be_used_as_a_small_one() -> None:
    x, t = torch.randn(2, LARGE), torch.tensor([0.25, 0.75])
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        x_t = add_noise(x, t, noise=x)
    assert not x_t._is_view()
    x_t.detach_().mul_(weight).sum().backward()
    assert weight.grad is not None


def test_a_default_device_and_torch_func_do_not_matter() -> None:
    x, t = torch.randn(2, LARGE), torch.tensor([0.25, 0.75])
    with torch.device("meta"):
        x_t = add_noise(x, t, noise=x)
    torch.testing.assert_close(x_t, x)
    gradient = torch.func.grad(lambda a: (add_noise(a, t, noise=x) * a).sum())(x)
    torch.testing.assert_close(gradient, x)
