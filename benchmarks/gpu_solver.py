"""What solving costs on a CUDA device, input group by input group of a Llama-3-8B block, and whether it is what a CPU would make of it.

    python benchmarks/gpu_solver.py [--rows 32 --warps 4] [--trace FILE]

Prints for each group the seconds of solve_group (median of three), its share that is products in float32 or TF32 by their number of
operations, and the relative error beside that of exact updates; then the same on a small group beside the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from torch import Tensor

from gptqkit.algorithms import fused, gptq, refine, refine_fused, sweep
from gptqkit.algorithms.factor import damping, factorize
from gptqkit.algorithms.gptq import EFFORTS, solve_group
from gptqkit.core.config import LinearSpec

GROUPS = {"q k v": (4096, 6144), "o": (4096, 4096), "gate up": (4096, 28672), "down": (14336, 4096)}


def gram_of(features: int, device: str) -> Tensor:
    """Of inputs with a few loud channels, correlated, from twice as many tokens as features."""
    generator = torch.Generator(device).manual_seed(0)
    scale_I = torch.rand(features, generator=generator, device=device).add_(0.1).pow_(3)
    scale_I[:4] *= 50
    mix_II = torch.randn(features, features, generator=generator, device=device).mul_(features**-0.5)
    gram_II = torch.zeros(features, features, device=device)
    for _ in range(2):
        x_MI = torch.randn(features, features, generator=generator, device=device)
        x_MI = (x_MI + x_MI @ mix_II) * scale_I
        gram_II += x_MI.T @ x_MI / (2 * features)
    return (gram_II + gram_II.T) / 2


def timed(function: object, *arguments: object, repeats: int = 3, **named: object) -> tuple[float, object]:
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = function(*arguments, **named)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=fused._ROWS)
    parser.add_argument("--warps", type=int, default=fused._WARPS)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS))
    parser.add_argument("--trace", help="write a table of the kernels of the last group there")
    parser.add_argument("--exact", action="store_true", help="also with exact updates instead of TF32")
    options = parser.parse_args()
    fused._ROWS, fused._WARPS = options.rows, options.warps
    spec = LinearSpec(4, 128, True)
    for name in options.groups:
        features, rows = GROUPS[name]
        gram_II = gram_of(features, "cuda")
        weight_OI = torch.randn(rows, features, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) * features**-0.5
        arguments = dict(order="group-aware", damp=0.01, effort=EFFORTS["fast"])
        solve_group([weight_OI], gram_II, [spec], **arguments)
        torch.cuda.reset_peak_memory_stats()
        seconds, (solution,) = timed(solve_group, [weight_OI], gram_II, [spec], **arguments)
        peak = torch.cuda.max_memory_allocated() / 1e9
        factor_seconds, _ = timed(factorize, gram_II, torch.arange(features, device="cuda"), 0.01, rule=damping)
        words = f"{name:8} {features:5} -> {rows:5}  {seconds:.3f} s (factor {factor_seconds:.3f})  peak {peak:.1f} GB"
        words += f"  error {solution.error:.6f} of {solution.error_rounded:.6f}"
        if options.exact:
            kept = sweep.short_updates
            for module in (sweep, refine, refine_fused):
                module.short_updates = nullcontext
            exact_seconds, (other,) = timed(solve_group, [weight_OI], gram_II, [spec], **arguments)
            same = (other.weight.codes_OI == solution.weight.codes_OI).float().mean().item()
            words += f"  exact: {exact_seconds:.3f} s, error {other.error:.6f}, {same:.4f} of codes equal"
            for module in (sweep, refine, refine_fused):
                module.short_updates = kept
        print(words, flush=True)
        if options.trace and name == options.groups[-1]:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                solve_group([weight_OI], gram_II, [spec], **arguments)
                torch.cuda.synchronize()
            with open(options.trace, "w") as file:
                file.write(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))
        del gram_II, weight_OI, solution
        gptq.torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
