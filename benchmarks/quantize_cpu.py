"""GPTQ on a CPU: gptqkit beside llm-compressor, same model, same calibration tokens, same bits; time, memory and quality.

    python benchmarks/quantize_cpu.py --model MODEL --calibration FILE --text HELDOUT --work FOLDER [--runs 3] [--evaluator evaluate.py]

Both tools run as child processes, in turn, so that a busy machine is busy for both. Wall and CPU seconds (user + system) and peak memory
are those of the whole child, imports included. llm-compressor gets the token ids ready-made; gptqkit reads and tokenises the text itself.

llm-compressor pins older versions of what gptqkit's environment holds, so it gets its own, made in FOLDER/llmcompressor (or
--peer-environment) on the first run: a few minutes, not counted. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small
build of torch. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gptqkit.bench.peers

PEER = "llmcompressor==0.14.0.1"
TORCH = "torch==2.13.0"  # installed first: the CPU build, the same as gptqkit's own
VERSIONS = ("torch", "transformers", "compressed-tensors", "llmcompressor")


@dataclass(frozen=True)
class Cost:
    """Of one run: wall seconds, CPU seconds of the child and its children, peak resident megabytes of the largest of them."""

    wall: float
    cpu: float
    peak_mb: float


def main() -> None:
    options = parse()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    peer_python = peer_environment(options.peer_environment or work / "llmcompressor")
    ids_file = work / "ids.json"
    ids_file.write_text(json.dumps(calibration_ids(options)), encoding="utf-8")
    outs = {"gptqkit": work / "out-gptqkit", "llm-compressor": work / "out-llmcompressor"}
    driver = Path(gptqkit.bench.peers.__file__).with_name("peer_llmcompressor.py")
    commands = {
        "gptqkit": gptqkit_command(options, outs["gptqkit"]),
        "llm-compressor": [
            *(str(peer_python), str(driver), options.model, str(outs["llm-compressor"]), str(ids_file)),
            *("4", "128", str(options.seed), "cpu"),
        ],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for run in range(options.runs):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            cost = measure(command, options.threads, work / f"{outs[name].name}.log")
            costs[name].append(cost)
            print(f"run {run + 1} of {options.runs}: {name} {cost.wall:.1f} s wall, {cost.cpu:.1f} s CPU", file=sys.stderr, flush=True)
    quality = {name: evaluate(options, out) for name, out in outs.items()}
    report(options, costs, quality, peer_python)


def gptqkit_command(options: argparse.Namespace, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gptqkit", "quantize", options.model, str(out), "--calibration", options.calibration),
        *("--bits", "4", "--group-size", "128", "--sym", "--samples", str(options.samples), "--seqlen", str(options.seqlen)),
        *("--seed", str(options.seed), "--device", "cpu", "--json"),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--calibration", required=True, help="text file, as for `gptqkit quantize --calibration`")
    parser.add_argument("--text", required=True, help="held-out text for the evaluation")
    parser.add_argument("--work", required=True, type=Path, help="folder for the environment and the outputs")
    parser.add_argument("--peer-environment", type=Path, help="virtual environment of llm-compressor; made when it is not there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of both")
    parser.add_argument("--evaluator", help="script called as SCRIPT MODEL OUT --text FILE, printing JSON; default: gptqkit eval")
    return parser.parse_args()


def peer_environment(folder: Path) -> Path:
    """The interpreter of llm-compressor's environment, made when it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        for package in (TORCH, PEER):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    return python


def calibration_ids(options: argparse.Namespace) -> list[list[int]]:
    """The very sequences that `gptqkit quantize` will cut from the file."""
    from gptqkit.calibration.load import load_calibration

    vocab_size = json.loads(Path(options.model, "config.json").read_text(encoding="utf-8"))["vocab_size"]
    calibration = load_calibration(
        options.calibration, tokenizer_folder=Path(options.model), vocab_size=vocab_size, samples=options.samples, seqlen=options.seqlen,
        seed=options.seed,
    )  # fmt: skip
    return [ids_T.tolist() for ids_T in calibration.ids]


def measure(command: list[str], threads: int, log: Path) -> Cost:
    """Runs a command to its end and asks the kernel what it took; exits with the end of its log when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        sys.exit(f"{' '.join(command)}\nfailed with exit code {code}; the end of {log}:\n" + log.read_text(errors="replace")[-3000:])
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def evaluate(options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Perplexity and KL to the original, by an independent script when one is given."""
    if options.evaluator:
        command = [sys.executable, options.evaluator, options.model, str(out), "--text", options.text]
    else:
        command = [sys.executable, "-m", "gptqkit", "eval", str(out), "--against", options.model, "--text", options.text, "--json"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    if options.evaluator:
        (scores,) = answer["texts"].values()
        return {"perplexity": scores["ppl"], "kl": scores["kl"]}
    return {"perplexity": answer["perplexity"], "kl": answer["kl"]}


def report(options: argparse.Namespace, costs: dict[str, list[Cost]], quality: dict[str, dict[str, float]], peer_python: Path) -> None:
    keys = ("wall", "cpu", "peak_mb")
    medians = {name: {key: statistics.median(asdict(cost)[key] for cost in runs) for key in keys} for name, runs in costs.items()}
    print(f"{'':16}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'ppl':>9}{'KL':>9}   medians of {options.runs}, {options.threads} threads")
    for name, row in medians.items():
        scores = quality[name]
        print(f"{name:16}{row['wall']:9.1f}{row['cpu']:9.1f}{row['peak_mb']:9.0f}{scores['perplexity']:9.3f}{scores['kl']:9.5f}")
    ratios = {key: medians["gptqkit"][key] / medians["llm-compressor"][key] for key in keys}
    print(f"{'ratio':16}{ratios['wall']:9.3f}{ratios['cpu']:9.3f}{ratios['peak_mb']:9.3f}")
    answer: dict[str, Any] = {
        "benchmark": "quantize_cpu",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": options.threads,
        "model": Path(options.model).name,
        "bits": 4, "group_size": 128, "sym": True, "samples": options.samples, "seqlen": options.seqlen, "seed": options.seed,
        "versions": {"gptqkit": versions(Path(sys.executable), ("gptqkit", *VERSIONS)), "llm-compressor": versions(peer_python, VERSIONS)},
        "evaluator": Path(options.evaluator).name if options.evaluator else "gptqkit eval",
        "medians": rounded(medians), "ratios": rounded(ratios), "quality": rounded(quality),
        "runs": {name: [rounded(asdict(cost)) for cost in runs] for name, runs in costs.items()},
    }  # fmt: skip
    print(json.dumps(answer))


def machine() -> dict[str, Any]:
    """Processor, cores and system, without the host's name."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.partition(":")[2].strip() for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    load = os.getloadavg()[0]
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(), "load": load}


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """What an environment holds; packages it lacks are left out."""
    program = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    held = json.loads(subprocess.run([str(python), "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {name: held[name] for name in packages if name in held}


def rounded(value: Any) -> Any:
    """Four significant digits for every number, however deep."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


if __name__ == "__main__":
    main()
