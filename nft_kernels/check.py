"""Compare the backends with the float64 reference: ``python -m nft_kernels.check``, or on live tensors."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import load
from .ops.add_noise import add_noise
from .ops.attention import attention
from .ops.attention import why_not as no_attention
from .ops.gelu import gelu
from .ops.group_norm_silu import group_norm_silu
from .ops.layer_norm_modulate import layer_norm_modulate
from .ops.nft_loss import nft_loss
from .ops.qk_norm import qk_norm
from .ops.quantize_rows import quantize_rows
from .ops.quantize_rows import why_not as no_float8
from .ops.solver_step import solver_step
from .reference import add_noise as noise_reference
from .solvers import schedule, table

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KernelMismatchError(RuntimeError):
    """A kernel disagrees with the reference by more than the bound."""


@dataclass(frozen=True)
class Comparison:
    """Worst elementwise error of one quantity and the bound it has to keep."""

    quantity: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


Check = Callable[[str, torch.dtype, str], Comparison]


def _compare(quantity: str, got: Tensor, plain: Tensor, exact: Tensor, scale: float = 0.0) -> Comparison:
    """Bound: twice the error of the plain formula in the output's dtype, or 4 ulp of the result or of ``scale``."""
    if not (got.isfinite().all() or plain.isfinite().all()):
        # What has diverged is no kernel's fault.
        return Comparison(quantity, 0.0, 0.0)
    error = (got.double() - exact).abs().max().item() if got.isfinite().all() else float("inf")
    ulp = torch.finfo(got.dtype).eps * max(exact.abs().max().item(), scale) + torch.finfo(got.dtype).smallest_normal
    return Comparison(quantity, error, max(2 * (plain.double() - exact).abs().max().item(), 4 * ulp))


def compare_nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    backend: str = "auto",
    **options: Any,
) -> list[Comparison]:
    """Run ``nft_loss`` and its gradient on copies of these tensors in ``backend`` and in the float64 reference.

    Args:
        v_theta, v_old, x_t, x0, t, r, options: as for ``nft_loss``.
        backend: the backend to judge.

    Returns:
        one comparison for the loss, each per-sample value and the gradient.

    Raises:
        KernelMismatchError: naming the quantity, its worst error and the bound.
    """

    def run(chosen: str, dtype: torch.dtype | None, r: Tensor = r) -> dict[str, Tensor]:
        def cast(x: Any) -> Any:
            return x.detach().to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x

        leaf = v_theta.detach().to(dtype or v_theta.dtype).clone().requires_grad_()
        with torch.enable_grad():
            out = nft_loss(
                leaf,
                *map(cast, (v_old, x_t, x0, t, r)),
                **{name: cast(value) for name, value in options.items()},
                backend=chosen,
            )
            # It has a value for every sample with reduction="none".
            out.loss.sum().backward()
        assert leaf.grad is not None
        return {name: value.detach() for name, value in out._asdict().items()} | {"gradient": leaf.grad}

    got, plain, exact = run(backend, None), run("reference", None), run("reference", torch.float64)
    # The gradient is affine in r, and near r = 1/2 its ends cancel: their size is what rounding is measured against.
    ends = [run("reference", torch.float64, end)["gradient"] for end in (torch.zeros_like(r), torch.ones_like(r))]
    scale = max(end.abs().max().item() for end in ends)
    results = [_compare(n, got[n], plain[n], exact[n], scale if n == "gradient" else 0.0) for n in got]
    for result in results:
        if not result.passed:
            raise KernelMismatchError(
                f"nft_loss, backend {backend!r}: {result.quantity} is off by {result.error:.3g}, "
                f"allowed are {result.bound:.3g}. Run `python -m nft_kernels.check`; "
                "set NFT_KERNELS_BACKEND=reference to go on without the kernels."
            )
    return results


def _check_loss(backend: str, dtype: torch.dtype, device: str) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(5, 16, 33, 31, generator=generator).to(device, dtype) for _ in range(5)]
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], device=device)
    r = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.7], device=device)
    v_theta, v_old, x_t, x0, v_ref = x
    tensors = (v_theta, v_old, x_t, x0)
    common: dict[str, Any] = {"v_ref": v_ref, "kl_weight": 0.01, "beta": 0.7, "backend": backend}
    results = []
    for prediction, kl_space in (("v", "v"), ("x0", "x0"), ("eps", "x0")):
        # An x0 prediction cannot be had from eps at t = 1.
        times = 0.9 * t if prediction == "eps" else t
        results += compare_nft_loss(*tensors, times, r, prediction=prediction, kl_space=kl_space, **common)
    mask = torch.linspace(-0.5, 1, 31, device=device, dtype=dtype).clamp_min(0)
    uneven: dict[str, Any] = {"mask": mask, "policy_weight": 1 - mask, "detach_weight": False} | common
    results += compare_nft_loss(*tensors, t, v_ref.sigmoid(), **uneven)
    offsets = torch.tensor([0, 2, 5], device=device)
    results += compare_nft_loss(*tensors, t[:2], r[:2], segments=offsets, **common)
    return max(results, key=lambda c: c.error / c.bound)


def _check_noise(backend: str, dtype: torch.dtype, device: str) -> Comparison:
    x0 = torch.randn(3, 4, 33, 31, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    t, sample = torch.tensor([0.0, 0.4, 1.0], device=device), torch.arange(3, device=device)
    noise = noise_reference.normals(torch.full_like(sample, 7), sample, x0[0].numel()).view(x0.shape)
    exact = noise_reference.add_noise(x0.double(), t, noise.double(), torch.float64)
    plain = noise_reference.add_noise(x0, t, noise, dtype)
    return _compare("x_t", add_noise(x0, t, noise=noise, backend=backend), plain, exact)


def _check_step(backend: str, dtype: torch.dtype, device: str) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    results = []
    for name in ("euler", "flow-sde", "dpm++3M", "deis", "unipc"):
        solver = table(name, schedule(6, shift=3.0))
        for i in range(len(solver.rows)):
            x, v, v_uncond, noise, *history = (
                torch.randn(3, 4, 33, 31, generator=generator).to(device, dtype) for _ in range(4 + solver.depth(i))
            )

            def run(backend: str, wide: bool, i=i, solver=solver, tensors=(x, v, v_uncond, noise), past=history):
                x, v, v_uncond, noise, *kept = (y.double() if wide else y for y in (*tensors, *past))
                options = {"v_uncond": v_uncond, "guidance": 4.5, "noise": noise, "x0": True}
                out = solver_step(solver, i, x, v, kept, **options, backend=backend)
                return {"x": out.x, "x0": out.x0}

            got, plain, exact = run(backend, False), run("reference", False), run("reference", True)
            results += [_compare(key, got[key], plain[key], exact[key]) for key in got]
    return max(results, key=lambda c: c.error / c.bound)


def _check_rows(
    op: Callable[..., tuple[Tensor, ...]], shapes: Sequence[tuple[int, ...]], differentiated: int = 1
) -> Check:
    """Of an op of a transformer or decoder: all outputs, and the gradients of as many of its first arguments."""

    def check(backend: str, dtype: torch.dtype, device: str) -> Comparison:
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

        def run(backend: str, wide: bool) -> list[Tensor]:
            args = [x.double() if wide else x.clone() for x in tensors]
            leaves = [x.requires_grad_() for x in args[:differentiated]]
            outs = op(*args, backend=backend)
            total = torch.stack([out.sin().sum() for out in outs]).sum()
            return [*outs, *(torch.autograd.grad(total, leaves) if leaves else ())]

        triples = zip(run(backend, False), run("reference", False), run("reference", True), strict=True)
        results = [_compare("row", got.detach(), plain.detach(), exact.detach()) for got, plain, exact in triples]
        return max(results, key=lambda c: c.error / c.bound)

    return check


def _check_quantize(backend: str, dtype: torch.dtype, device: str) -> Comparison:
    """Rounded to float8 it may be as far from x as the reference, but for last bits of float32, and no farther."""
    x = 3 * torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    results = []
    for activated in (False, True):
        exact = (F.gelu(x.double(), approximate="tanh") if activated else x.double()).flatten(0, 1)

        def error(backend: str, activated=activated, exact=exact) -> float:
            rows, scale = quantize_rows(x, gelu=activated, backend=backend)
            return (rows.double() * scale - exact).abs().max().item()

        results.append(Comparison("rows", error(backend), 1.0001 * error("reference")))
    return max(results, key=lambda c: c.error / c.bound)


_CHECKS: dict[str, Check] = {
    "add_noise": _check_noise,
    "nft_loss": _check_loss,
    "solver_step": _check_step,
    "gelu": _check_rows(lambda x, backend: (gelu(x, backend=backend),), [(5, 7, 96)]),
    "layer_norm_modulate": _check_rows(
        lambda x, y, y2, y_bias, gate, gate2, *modulations, backend: layer_norm_modulate(
            x, *modulations, y=y, gate=gate, y_bias=y_bias, y2=y2, gate2=gate2, backend=backend
        ),
        [(2, 7, 96)] * 3 + [(96,)] + [(2, 96)] * 6,
    ),
    "qk_norm": _check_rows(
        lambda *x, backend: qk_norm(*x[:8], v=x[8], context_v=x[9], backend=backend),
        [*[(2, 7, 3, 32)] * 2, *[(32,)] * 2, *[(2, 5, 3, 32)] * 2, *[(32,)] * 2, (2, 7, 3, 32), (2, 5, 3, 32)],
    ),
    "quantize_rows": _check_quantize,
    "attention": _check_rows(
        lambda q, k, v, backend: (attention(q, k, v, backend=backend),), [(3, 37, 2, 20)] * 3, differentiated=3
    ),
    "group_norm_silu": _check_rows(
        lambda x, weight, bias, backend: (group_norm_silu(x, weight, bias, groups=8, eps=1e-6, backend=backend),),
        [(3, 16, 33, 31), (16,), (16,)],
        differentiated=0,
    ),
}
# Without kernels for a backend and a kind of device.
_MISSING = {
    "gelu": (("native", "cuda"), ("triton", "cpu"), ("triton", "cuda")),
    "attention": (("native", "cuda"), ("triton", "cpu"), ("triton", "cuda")),
    "group_norm_silu": (("native", "cuda"), ("triton", "cpu"), ("triton", "cuda")),
    "layer_norm_modulate": (("native", "cuda"),),
    "qk_norm": (("native", "cuda"),),
    "quantize_rows": (("native", "cpu"), ("native", "cuda")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").partition("\n\n")[0]
    argparse.ArgumentParser(prog="python -m nft_kernels.check", description=about).parse_args(arguments)
    gpu = ["cuda"] if torch.cuda.is_available() else []
    candidates = [("reference", "cpu"), ("native", "cpu"), *(("native", d) for d in gpu), ("triton", *(gpu or ["cpu"]))]
    places, reasons = [], {}
    for backend, device in candidates:
        reason = None if backend == "reference" else load(backend).why_not(torch.empty(0, device=device))
        if reason is None:
            places.append((backend, device))
        else:
            reasons[backend, device] = reason
    rows = []
    for (backend, device), (op, check), dtype in itertools.product(places, _CHECKS.items(), _DTYPES):
        if (backend, device) in _MISSING.get(op, ()):
            continue
        if op == "attention" and backend == "native" and no_attention(torch.empty(0, dtype=dtype)):
            continue
        if op == "quantize_rows" and (reason := no_float8(torch.device(device))):
            reasons[op, device] = reason
            continue
        try:
            worst = check(backend, dtype, device)
            numbers, passed = (f"{worst.error:.2e}", f"{worst.bound:.2e}"), worst.passed
        except KernelMismatchError as error:
            numbers, passed = (str(error), ""), False
        rows.append((op, f"{backend} {device}", str(dtype)[6:], *numbers, passed))
    line = "{:19} {:13} {:9} {:>12} {:>10}  {}"
    print(line.format("op", "backend", "dtype", "worst error", "bound", "pass"))
    for row in rows:
        print(line.format(*row[:5], "yes" if row[5] else "NO"))
    for (backend, device), reason in reasons.items():
        print(f"{backend} {device} was not checked: {reason}")
    return 0 if all(row[5] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
