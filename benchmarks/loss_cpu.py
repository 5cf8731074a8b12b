"""Time loss forward + backward on the CPU, interleaved in one run: ``python benchmarks/loss_cpu.py``.

Providers: the plain eager formula with its float64 weights, torch.compile of it, and the native backend.
"""

import argparse
import datetime
import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from nft_kernels import nft_loss


def plain(v_theta, v_old, x_t, x0, t, r, beta=1.0, M=5.0):
    t, r = t.view(-1, 1, 1, 1), r.view(-1)
    total = 0
    for sign, share in ((1, r), (-1, 1 - r)):
        prediction = x_t - t * ((1 - sign * beta) * v_old + sign * beta * v_theta)
        with torch.no_grad():
            weight = (prediction.double() - x0.double()).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
        total = total + share * ((prediction - x0) ** 2 / weight).mean((1, 2, 3))
    return (M * total / beta).mean()


def peak_extra_bytes(step):
    """Most memory held at once by what ``step`` allocates, its result included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    del result
    return max(held)


def measure(dtype, batch, seconds):
    x = [torch.randn(batch, 16, 64, 64).to(dtype) for _ in range(4)]
    leaf, t, r = x[0].requires_grad_(), torch.rand(batch), torch.rand(batch)
    compiled = torch.compile(plain)
    run = {
        "eager": lambda: plain(leaf, *x[1:], t, r),
        "compile": lambda: compiled(leaf, *x[1:], t, r),
        "native": lambda: nft_loss(leaf, *x[1:], t, r, backend="native").loss,
    }
    grads, peaks = {}, {}
    for name, loss in run.items():
        (grads[name],) = torch.autograd.grad(loss(), leaf)
        peaks[name] = peak_extra_bytes(lambda loss=loss: torch.autograd.grad(loss(), leaf)) / leaf.nbytes
    error = (grads["native"].double() - grads["eager"].double()).abs().max() / grads["eager"].abs().max()
    if error > 8 * torch.finfo(dtype).eps:
        sys.exit(f"native disagrees with the plain formula by {error:.2g}: no speed-up is reported")
    times = {name: [] for name in run}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, loss in run.items():
            # Graph and gradient die after the clock has stopped: giving eager's large temporaries back to the
            # system would otherwise fall to whoever frees the next tensor.
            begin = time.perf_counter()
            out = loss()
            grad = torch.autograd.grad(out, leaf)
            times[name].append(time.perf_counter() - begin)
            del out, grad
    source, target = torch.randn(2**26), torch.empty(2**26)
    copies = []
    for _ in range(7):
        begin = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - begin)
    bandwidth = 2 * source.nbytes / statistics.median(copies) / 1e9
    moved = 5 * leaf.nbytes / 1e9
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "dtype": str(dtype)[6:],
        "batch": batch,
        "rounds": len(times["native"]),
        "median_us": {name: round(value * 1e6, 1) for name, value in medians.items()},
        "peak_extra_memory_in_inputs": {name: round(value, 3) for name, value in peaks.items()},
        "speedup_over_eager": round(medians["eager"] / medians["native"], 2),
        "speedup_over_compile": round(medians["compile"] / medians["native"], 2),
        "native_GB_per_s": round(moved / medians["native"], 1),
        "copy_GB_per_s": round(bandwidth, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [(torch.float32, 9), (torch.bfloat16, 9), (torch.float32, 128)]
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "").split(":")[-1]
    result = {
        "command": "python benchmarks/loss_cpu.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{model.strip()}, {options.threads} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cases": [measure(dtype, batch, options.seconds) for dtype, batch in cases],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
