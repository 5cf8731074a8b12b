"""Time the ops against what a user would write: ``python -m nft_kernels.bench``; ``--help`` lists the choices.

All providers of a case run interleaved in one process and are checked against the float64 reference first; one that
fails the check is reported without a speed-up. ``--compare OLD NEW`` exits with 1 where a median grew past a threshold.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import __version__, add_noise, backends, nft_loss, solver_step
from .backends import _memory
from .provenance import write_report
from .reference import add_noise as noise_reference
from .solvers import schedule, table

SHAPES = {
    "sd35_512": (16, 64, 64),
    "sd35_1024": (16, 128, 128),
    "flux_1024": (4096, 64),
    "wan_480p": (16, 21, 60, 104),
}
"""One sample's latents: Stable Diffusion 3.5, FLUX.1 in packed tokens, Wan 2.1 with 81 frames."""

MODES = ("forward", "backward", "both", "no_grad")
OPTIONS = ("none", "mask", "r_per_element", "weight_per_token", "segments")
"""Of the loss: a mask per token, an r and a weight for each of these, and packed sequences of different lengths."""
PROVIDERS = ("eager", "compile", "reference", "native", "triton")
_FLUSH_BYTES = 2**28
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is timed; ``mode`` and ``option`` matter to the loss only."""

    op: str
    mode: str
    dtype: str
    shape: str
    batch: int
    cache: str
    option: str = "none"


def plain_loss(v_theta, v_old, x_t, x0, t, r, beta=1.0, M=5.0):
    """The loss as the official implementation writes it, with its float64 weights."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    axes, total = tuple(range(1, x0.ndim)), 0
    for sign, share in ((1, r), (-1, 1 - r)):
        prediction = x_t - t * ((1 - sign * beta) * v_old + sign * beta * v_theta)
        with torch.no_grad():
            weight = (prediction.double() - x0.double()).abs().mean(axes, keepdim=True).clip(min=1e-5)
        total = total + share * ((prediction - x0) ** 2 / weight).mean(axes)
    return (M * total / beta).mean()


def _plain_with(
    mean: Callable[[Tensor], Tensor], weigh: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    """The loss with an option, in float32, to which t promotes narrower latents: ``mean`` over a sample, ``weigh`` for
    the weight of its errors, ``spread`` for what there is of every sample."""

    def loss(v_theta, v_old, x_t, x0, t, r):
        t, r, total = spread(t), r if r.ndim == x0.ndim else spread(r), 0
        for sign, share in ((1, r), (-1, 1 - r)):
            error = x_t - t * ((1 - sign) * v_old + sign * v_theta) - x0
            weight = weigh(error.detach().abs()).clamp_min(1e-5)
            total = total + mean(share * error**2 / weight)
        return (5 * total).mean()

    return loss


def _optional_loss(case: Case, device: torch.device) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The plain formula of a case and the options of ``nft_loss``."""
    if case.option == "none":
        return plain_loss, {}
    shape = (case.batch, *SHAPES[case.shape])
    axes, ones = tuple(range(1, len(shape))), (1,) * (len(shape) - 1)
    channels = 1 if len(shape) > 3 else len(shape) - 1
    generator = torch.Generator(device).manual_seed(1)

    def spread(x: Tensor) -> Tensor:
        return x.view(-1, *ones)

    def mean(y: Tensor) -> Tensor:
        return y.mean(axes, keepdim=True)

    if case.option == "mask":
        each = [1 if axis == channels else size for axis, size in enumerate(shape)]
        mask = torch.rand(each, generator=generator, device=device) + 0.1

        def masked(y: Tensor) -> Tensor:
            return (mask * y).sum(axes, keepdim=True) / mask.expand_as(y).sum(axes, keepdim=True)

        return _plain_with(masked, masked, spread), {"mask": mask}
    if case.option == "weight_per_token":
        options = {"weight_per": "token", "channel_dim": channels}
        return _plain_with(mean, lambda y: y.mean(channels, keepdim=True), spread), options
    if case.option == "segments":
        # Lengths around those of the shape, by up to a half.
        rows, count = case.batch * shape[1], case.batch
        shift = torch.rand(count - 1, generator=generator, device=device) - 0.5
        inner = ((torch.arange(1, count, device=device) + shift / 2) * shape[1]).long()
        offsets = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), rows)])
        lengths = offsets.diff()
        index = torch.arange(count, device=device).repeat_interleave(lengths)

        def by_segment(y: Tensor) -> Tensor:
            return y.new_zeros(count).index_add(0, index, y.flatten(1).mean(1)) / lengths

        def spread_rows(x: Tensor) -> Tensor:
            return x[index].view(-1, *ones[1:])

        return _plain_with(by_segment, lambda y: spread_rows(by_segment(y)), spread_rows), {"segments": offsets}
    return _plain_with(mean, mean, spread), {}


def _plain_noise(x0, t, noise):
    t = t.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return (1 - t) * x0 + t * noise


def _plain_step(x, v, older, oldest, a, b0, b1, b2, t):
    """x' and the prediction of x0 that the next step needs."""
    x0 = x - t * v
    return a * x + b0 * x0 + b1 * older + b2 * oldest, x0


def _inputs(case: Case, device: torch.device, count: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.batch, *SHAPES[case.shape]), getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def _fused(device: torch.device) -> list[str]:
    """The backends with kernels for the device; on the CPU Triton only interprets."""
    names = ("native",) if device.type == "cpu" else ("native", "triton")
    return [name for name in names if backends.load(name).why_not(torch.empty(0, device=device)) is None]


class Work(NamedTuple):
    """What one case needs: calls to time and to check by provider, the exact value, and what errors are measured by."""

    calls: dict[str, Callable[[], Any]]
    checked: dict[str, Callable[[], Tensor]]
    exact: Tensor
    size: float
    gigabytes: float
    """The least that has to be read and written."""


def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes of one case, whatever was compiled before it."""
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False, fullgraph=True)


def _noise_work(case: Case, device: torch.device) -> Work:
    (x0,) = _inputs(case, device, 1)
    t, seeds = torch.linspace(0.1, 0.9, case.batch, device=device), torch.arange(case.batch, device=device)
    noise = noise_reference.normals(seeds, torch.zeros_like(seeds), x0[0].numel()).view_as(x0)
    # PyTorch draws its own noise, as every trainer does; of its formula the arithmetic is checked, on our noise.
    calls: dict[str, Callable[[], Any]] = {}
    checked: dict[str, Callable[[], Tensor]] = {}
    for name, formula in (("eager", _plain_noise), ("compile", _compiled(_plain_noise))):
        calls[name] = partial(lambda formula: formula(x0, t, torch.randn_like(x0)), formula)
        checked[name] = partial(formula, x0, t, noise.to(x0.dtype))
    for name in ("reference", *_fused(device)):
        calls[name] = partial(add_noise, x0, t, seed=seeds, backend=name)
        checked[name] = calls[name]
    exact = noise_reference.add_noise(x0.double(), t, noise.double(), torch.float64)
    return Work(calls, checked, exact, exact.abs().max().item(), 2 * x0.nbytes / 1e9)


def _step_work(case: Case, device: torch.device) -> Work:
    x, v, older, oldest = _inputs(case, device, 4)
    solver = table("dpm++3M", schedule(10, shift=3.0))
    i = next(i for i, row in enumerate(solver.rows) if solver.depth(i) == 2 and len(row.b) == 3)
    row = solver.rows[i]
    numbers = (row.a, *row.b, row.t)
    calls: dict[str, Callable[[], Any]] = {
        name: partial(formula, x, v, older, oldest, *numbers)
        for name, formula in (("eager", _plain_step), ("compile", _compiled(_plain_step)))
    }
    for name in ("reference", *_fused(device)):
        calls[name] = partial(solver_step, solver, i, x, v, (older, oldest), backend=name)
    checked: dict[str, Callable[[], Tensor]] = {
        name: partial(lambda call: call()[0], call) for name, call in calls.items()
    }
    exact = _plain_step(*(y.double() for y in (x, v, older, oldest)), *numbers)[0]
    return Work(calls, checked, exact, exact.abs().max().item(), 6 * x.nbytes / 1e9)


def _loss_work(case: Case, device: torch.device) -> Work:
    leaf, *others = _inputs(case, device, 4)
    t, r = (torch.linspace(0.1, 0.9, case.batch, device=device) for _ in range(2))
    if case.option == "segments":
        leaf, *others = (x.flatten(0, 1) for x in (leaf, *others))
    if case.option == "r_per_element":
        r = torch.rand(leaf.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    fixed = (*others, t, r)
    formula, options = _optional_loss(case, device)
    losses: dict[str, Callable[..., Tensor]] = {"eager": formula, "compile": _compiled(formula)}
    for name in ("reference", *_fused(device)):
        losses[name] = partial(lambda name, *tensors: nft_loss(*tensors, backend=name, **options).loss, name)
    leaf.requires_grad_(case.mode != "no_grad")

    def gradient(loss: Callable[..., Tensor], v_theta: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        probe = v_theta.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(probe, *tensors), probe)[0]

    def timed(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        if case.mode in ("forward", "no_grad"):
            return lambda: loss(leaf, *fixed)
        if case.mode == "both":
            return lambda: torch.autograd.grad(loss(leaf, *fixed), leaf)
        # Made by the first call, which is not timed.
        held = cache(partial(loss, leaf, *fixed))
        return lambda: torch.autograd.grad(held(), leaf, retain_graph=True)

    exact = gradient(formula, leaf.double(), [y.double() for y in fixed])
    tensors = 4 if case.mode in ("forward", "no_grad") else 5
    return Work(
        {name: timed(loss) for name, loss in losses.items()},
        {name: partial(gradient, loss, leaf, fixed) for name, loss in losses.items()},
        exact,
        exact.abs().max().item(),
        (tensors * leaf.nbytes + r.nbytes) / 1e9,
    )


_WORK = {"nft_loss": _loss_work, "add_noise": _noise_work, "solver_step": _step_work}


def build(case: Case, device: torch.device, wanted: Sequence[str] = PROVIDERS) -> Work:
    """Inputs and calls of one case, for those of the wanted providers that run on the device."""
    work = _WORK[case.op](case, device)
    calls = {name: call for name, call in work.calls.items() if name in wanted}
    if not calls:
        raise ValueError(f"providers: got {', '.join(wanted)}, none of which runs {case.op} on {device}")
    return work._replace(calls=calls)


def _copy(device: torch.device) -> tuple[Callable[[], Any], float]:
    """A copy that is larger than any cache, and the gigabytes that it reads and writes."""
    # Memory that was never written is one page of zeros to a CPU, which its cache holds.
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes / 1e9


def _replayed(name: str, call: Callable[[], Any]) -> Callable[[], Any] | None:
    """``call`` as a CUDA graph, whose replay costs none of the time that Python needs to launch it; None, with a word
    about it, where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # A capture that fails may leave its own stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = call()
    except RuntimeError as error:
        print(f"{name} is called, not replayed: {error}", file=sys.stderr)
        return None

    # What the graph writes to must live as long as it.
    def replay(_: Any = result) -> None:
        graph.replay()

    return replay


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to blocks of 32 MiB, which it otherwise gives back in whichever call happens to
    free next: that can take longer than the call, and is seldom the provider's whose memory it was."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def _time(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float, *, cold: bool
) -> dict[str, list[float]]:
    """Seconds of every call, interleaved for ``seconds`` in all, at least five times each. Before each of them the
    caches are flushed, or else the same call is made once, so that they hold what it left and not what others did."""
    _keep_freed_memory()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            if flush is not None:
                flush.add_(1)
            else:
                call()
            if device.type == "cuda":
                begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The device waits for some 50 us, in which it is told what to do, so that its time and not that of
                # the launches is taken.
                torch.cuda._sleep(100_000)
                begin.record()
                result = call()
                stop.record()
                stop.synchronize()
                times[name].append(begin.elapsed_time(stop) / 1e3)
            else:
                begin_time = time.perf_counter()
                result = call()
                times[name].append(time.perf_counter() - begin_time)
            # Freed outside the clock: otherwise one provider's temporaries are given back on another's time.
            del result
    return times


def peak_and_launches(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Most megabytes held at once by what ``call`` allocates, and its kernels on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return (torch.cuda.max_memory_allocated() - before) / 1e6, len(kernels)
    _memory.release()
    before, _ = _memory.sizes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    # The profiler does not see this memory, which stays until it is released.
    lent = sum(_memory.sizes()) - before
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    del result
    return (max(held, default=0) + lent) / 1e6, None


def measure(case: Case, device: torch.device, seconds: float, wanted: Sequence[str] = PROVIDERS) -> list[Row]:
    """Check and time every provider of one case, and a copy between them.

    Returns:
        A row of results for each provider: ``median``, ``p20`` and ``p80`` in microseconds, ``gigabytes`` that have to
        be moved at least, ``graph`` where replays of a CUDA graph were timed and not calls from Python.
    """
    work = build(case, device, wanted)
    moved, eps = work.gigabytes, torch.finfo(getattr(torch, case.dtype)).eps
    passed = {
        name: (work.checked[name]().double() - work.exact).abs().max().item() <= 16 * eps * work.size
        for name in work.calls
    }
    graphed: dict[str, Callable[[], Any]] = {}
    # A backward runs on the stream of its forward, which was not captured.
    if device.type == "cuda" and case.mode != "backward":
        graphed = {name: replay for name, call in work.calls.items() if (replay := _replayed(name, call)) is not None}
    copy, copied = _copy(device)
    times = _time(work.calls | graphed | {"copy": copy}, device, seconds, cold=case.cache == "cold")
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = copied / medians["copy"]

    def row(name: str) -> Row:
        values, median = sorted(times[name]), medians[name]
        peak, launches = peak_and_launches(work.calls[name], device)
        over = {other: medians[other] / median for other in ("eager", "compile") if other in medians and passed[name]}
        return asdict(case) | {
            "provider": name,
            "check": passed[name],
            "median": median * 1e6,
            "p20": values[len(values) // 5] * 1e6,
            "p80": values[len(values) * 4 // 5] * 1e6,
            "gigabytes": moved,
            "gigabytes_per_second": moved / median,
            "share_of_copy": moved / median / bandwidth,
            "copy_gigabytes_per_second": bandwidth,
            "peak_megabytes": peak,
            "launches": launches,
            "graph": name in graphed,
            "over_eager": over.get("eager"),
            "over_compile": over.get("compile"),
        }

    return [row(name) for name in work.calls]


def compare(old: Path, new: Path, threshold: float) -> list[str]:
    """What grew: one line for each case and provider whose median is more than ``threshold`` times the old one, that is
    missing, or whose numbers are wrong now.

    Raises:
        ValueError: a file without results.
    """

    def rows(path: Path) -> dict[str, Row]:
        try:
            found = list(json.loads(path.read_text())["results"])
            if not all({"median", "check", "provider"} <= row.keys() for row in found):
                raise ValueError("its results are others")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--compare: got {path}, accepted is a file of --json ({error!r})") from error
        if not found:
            raise ValueError(f"--compare: got {path}, which has no results")
        # Files of older versions have no option.
        keys = (*Case.__dataclass_fields__, "provider")
        return {" ".join(str(row.get(key, "none")) for key in keys): row for row in found}

    def said(before: float, after: Row | None) -> str | None:
        if after is None:
            return "is missing"
        if not after["check"]:
            return "fails its check"
        longer = after["median"] > threshold * before
        return f"{before:.1f} us became {after['median']:.1f} us" if longer else None

    later = rows(new)
    lines = ((key, said(row["median"], later.get(key))) for key, row in rows(old).items())
    return [f"{key}: {what}" for key, what in lines if what]


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = (
        f"{r['op']} {r['mode']} {r['option']}\n{r['dtype']} {r['shape']}\nB={r['batch']} {r['cache']}" for r in rows
    )
    labels = list(dict.fromkeys(cases))
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(labels), 4.5))
    for i, provider in enumerate(providers):
        values = [r["share_of_copy"] for r in rows if r["provider"] == provider]
        axis.bar([x + i / (len(providers) + 1) for x in range(len(values))], values, 1 / (len(providers) + 1),
                 label=provider)  # fmt: skip
    axis.set_xticks([x + 0.4 for x in range(len(labels))], labels, fontsize=7)
    axis.set_ylabel("share of the copy bandwidth")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _markdown(rows: list[Row]) -> str:
    columns = ("op", "mode", "option", "dtype", "shape", "B", "cache", "provider", "median", "of copy", "peak",
               "over eager", "over torch.compile")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]

    def times(row: Row, key: str) -> str:
        if not row["check"]:
            return "check failed"
        return "" if row[key] is None else f"{row[key]:.2f}x"

    for r in rows:
        cells = [r["op"], r["mode"], r["option"], r["dtype"], r["shape"], r["batch"], r["cache"], r["provider"],
                 f"{r['median']:.0f} us", f"{r['share_of_copy']:.0%}", f"{r['peak_megabytes']:.1f} MB",
                 times(r, "over_eager"), times(r, "over_compile")]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"got {text}, accepted are finite numbers above 0")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def _device(text: str) -> torch.device:
    try:
        # Which not every device has.
        return torch.Generator(torch.empty(0, device=text).device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"got {text}, accepted is a device that torch has here ({reason})") from error


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, accepted is a file in a folder that exists")
    return path


def _plot_file(text: str) -> Path:
    path = _new_file(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"got {text}, accepted is a name that ends with .png, .pdf or .svg")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nft_kernels.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", default=["nft_loss"], choices=list(_WORK))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="by default all that run here")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="of the loss; both by default")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="of the loss; none by default")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"],
                        choices=["float32", "bfloat16", "float16"])  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=["sd35_512"], choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=_positive(int), default=[9])
    parser.add_argument("--caches", nargs="+", default=["warm"], choices=["warm", "cold"])
    parser.add_argument("--seconds", type=_positive(float), default=4.0, help="for each case")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=_positive(int), help="of the CPU; as many as there are by default")
    for name, kind in (("json", _new_file), ("csv", _new_file), ("plot", _plot_file)):
        parser.add_argument(f"--{name}", type=kind, help=f"file to write the results to as {name}")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files of --json")
    parser.add_argument("--threshold", type=_positive(float), help="of --compare; 1.1 by default")
    return parser


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for op in options.ops:
        of_loss = op == "nft_loss"
        modes, extras = (options.modes or ["both"], options.options or ["none"]) if of_loss else (["forward"], ["none"])
        for case in itertools.product(modes, options.dtypes, options.shapes, options.batches, options.caches, extras):
            yield Case(op, *case)


def _write(rows: list[Row], options: argparse.Namespace, arguments: Sequence[str]) -> None:
    copies = [row["copy_gigabytes_per_second"] for row in rows]
    print(f"copy bandwidth {min(copies):.1f} to {max(copies):.1f} GB/s")
    print(_markdown(rows))
    if options.json:
        command, figures = "python -m nft_kernels.bench", {"results": rows}
        write_report(options.json, command, options.device, figures, arguments, nft_kernels=__version__)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        _plot(rows, options.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare:
        old, new = options.compare
        try:
            slower = compare(old, new, options.threshold or 1.1)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(slower) or "nothing became slower")
        return 1 if slower else 0
    if options.threshold:
        parser.error(f"--threshold: got {options.threshold} without --compare")
    if options.threads:
        if options.threads > (most := os.cpu_count() or 1):
            parser.error(f"--threads: got {options.threads}, accepted are 1 to {most}")
        torch.set_num_threads(options.threads)
    device, wanted = options.device, options.providers or PROVIDERS
    if device.type == "cuda":
        # Streams, events, graphs and the memory in use are those of the current one.
        torch.cuda.set_device(device)
    absent = {"native", "triton"}.intersection(options.providers or ()) - set(_fused(device))
    if absent:
        parser.error(f"--providers: got {', '.join(sorted(absent))}, which cannot run on {device}")
    if "nft_loss" not in options.ops and (options.modes or options.options):
        parser.error(f"--modes, --options: are of nft_loss, got --ops {' '.join(options.ops)}")
    rows: list[Row] = []
    stopped = False
    try:
        for case in _cases(options):
            print("measuring", *asdict(case).values(), file=sys.stderr, flush=True)
            rows += measure(case, device, options.seconds, wanted)
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        if rows:
            _write(rows, options, arguments or sys.argv[1:])
        parser.error(f"--batches: got {', '.join(map(str, options.batches))}, which need more memory than there is")
    except KeyboardInterrupt:
        if not rows:
            return 130
        stopped = True
        print("stopped: what was measured is kept", file=sys.stderr)
    _write(rows, options, arguments or sys.argv[1:])
    if stopped:
        return 130
    return 0 if all(row["check"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
