# yolo_qc_plugin, AGPL-3.0
"""Time of one quantizer, forward and backward, against what memory allows, over sizes of 10 kB to 100 MB.

    python examples/benchmarks/quantizer.py

Forward reads x and writes xhat, backward reads the gradient and x and writes a gradient: five passes over memory,
which x.clone() and then x + gradient make too, over as many bytes. They are the bound; 2.5 copies of x stand beside
them. What is freed stays with the process: else, in the bound too, pages that the system hands out anew cost several
times the passes themselves. Compiled passes, separate operations and torch's own learnable operator take turns in one
run. Writes a JSON file, a Markdown page and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from about import about, versions

from yolo_qc_plugin.quant import kernels
from yolo_qc_plugin.quant.functional import fake_quantize

SIZES = [10_000 * 10 ** (n / 3) for n in range(13)]  # bytes of FP32


def quantize(compiled: bool):
    """Forward and backward of our quantizer with offset."""

    def run(x, grad, scale, offset):
        kernels.enabled = compiled
        fake_quantize(x, scale, offset, 0, 15, 1.0).backward(grad)

    return run


def torch_learnable(x, grad, scale, offset):
    """The same by torch's learnable operator, which has a zero point in the place of the offset."""
    torch._fake_quantize_learnable_per_tensor_affine(x, scale, -offset / scale, 0, 15, 1.0).backward(grad)


def copy(x, grad, scale, offset):
    """Two passes."""
    x.detach().clone()


def five_passes(x, grad, scale, offset):
    """Two passes, then three; both results live as long as the quantizer's."""
    xhat = x.detach().clone()
    x.grad = x.detach() + grad
    del xhat


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc reads them as a process starts
QUANTIZERS = {"compiled": quantize(True), "separate operations": quantize(False), "torch": torch_learnable}
METHODS = {"copy": copy, "five passes": five_passes, **QUANTIZERS}


def measure(size: float, device: str, repeats: int) -> dict[str, float]:
    """Method -> median ms of forward and backward ("copy": of one copy)."""
    n = round(size / 4)
    x = torch.randn(n, device=device, requires_grad=True)
    scale = torch.tensor([0.2], device=device, requires_grad=True)
    offset = torch.tensor([-0.6], device=device, requires_grad=True)
    grad = torch.randn(n, device=device)
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(repeats + 2):
        for name, method in METHODS.items():
            for settle in (True, False):
                x.grad = scale.grad = offset.grad = None
                if device != "cpu":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                method(x, grad, scale, offset)
                if device != "cpu":
                    torch.cuda.synchronize()
                if not settle and turn > 1:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def page(record: dict) -> str:
    """The record as Markdown."""
    lines = [
        "# Time of one quantizer",
        "",
        f"Written by `examples/benchmarks/quantizer.py`. {record['machine']}, {record['threads']} threads, "
        f"{record['repeats']} turns; forward and backward, median ms and ratio to five passes over memory. "
        + versions(record) + ".",
        "",
        "| MB | five passes | 2.5 copies | " + " | ".join(QUANTIZERS) + " |",
        "|---|---|---|" + "---|" * len(QUANTIZERS),
    ]  # fmt: skip
    for r in record["results"]:
        ms, bound = r["ms"], r["ms"]["five passes"]
        cells = [f"{t:.3f} ({t / bound:.2f}x)" for t in (2.5 * ms["copy"], *(ms[n] for n in QUANTIZERS))]
        lines.append(f"| {r['mb']:.3g} | {bound:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="as Ultralytics: 1")
    p.add_argument("--repeats", type=int, default=50)
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "quantizer.json"
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    if not os.environ.keys() >= KEEP_MEMORY.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(args.threads)
    results = [{"mb": size / 1e6, "ms": measure(size, args.device, args.repeats)} for size in SIZES]
    record = {**about(), **{k: getattr(args, k) for k in ("device", "threads", "repeats")}, "results": results}
    record["machine"] = record.pop("cpu") if args.device == "cpu" else torch.cuda.get_device_name()
    file.write_text(json.dumps(record, indent=1))
    file.with_suffix(".md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
