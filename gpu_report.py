"""One page of what this project does on a graphics card, for whoever has one to paste where others read it: python bench.py gpu.

Every part is a program of its own, so that one that fails, or that leaves the card in an error, does not end the others.
"""
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import kernels
import training
from console import atomic_write, duration
from kernels import build
from machine import cpu_name

ROOT = Path(__file__).resolve().parent
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
REPORT = Path("out/gpu_report.md")


def missing():
    """Why there is no card for PyTorch here, in words; None where there is one."""
    if torch.cuda.is_available():
        return None
    if not torch.version.cuda:
        return "this PyTorch is built without CUDA: install the one for your CUDA from pytorch.org"
    driver = "its driver answers, and PyTorch cannot use it" if answer("nvidia-smi", "-L") else "no NVIDIA driver answers (nvidia-smi)"
    return f"PyTorch {torch.__version__} sees no card, and {driver}"


def answer(*command):
    """What a program prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device):
    """What the numbers below it depend on, in lines."""
    card = answer("nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader") if device == "cuda" else None
    version = re.search(r"release ([\d.]+)", answer("nvcc", "--version") or "")
    served = ", ".join(kernels.extension_devices()) or "nothing"
    return [f"{card or cpu_name()}; {platform.platform()}, python {platform.python_version()}, torch {torch.__version__}",
            f"this code at {training.revision()}; CUDA toolkit {version[1] if version and build.cuda_home() else 'none (nvcc: the kernels for a card cannot be built without it)'}; the extension serves {served}"]


def parts(device, folder):
    """(title, command, seconds that it may take) of every part; on a CPU all are small, to try the report. What they write goes into folder."""
    card = device == "cuda"
    python = lambda script, *args: [sys.executable, str(ROOT / script), *map(str, args)]
    bench = lambda *args: python("bench.py", *args, "--device", device)
    chosen = "cuda and not source and not builds or current_stream or two_devices" if card else "one_noise"
    yield "tests of the kernels", [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_kernels.py"), "-k", chosen], 1800
    for tool in SANITIZERS if card and shutil.which("compute-sanitizer") else ():
        yield f"compute-sanitizer {tool}", ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *bench("kernels", "--size", 32, "--equal_only")], 1800
    for dtype in ("float32", "bfloat16"):
        yield f"the kernels against the memory, {dtype}", bench("kernels", "--dtype", dtype, *(() if card else ("--size", 16, "--only", "to_uint8"))), 1800
    yield "the network", bench("model", "--size", 256 if card else 32), 900
    for preset, batch, size in (("ffhq", 8, 256), ("photos", 32, 128)) if card else (("tiny", 1, 32),):
        yield f"a training step of {preset}", bench("train", "--model", preset, "--batch", batch, "--size", size, "--steps", 10 if card else 1, *(["--compile"] if card else [])), 1800
    small = ("--data_dir", ROOT / "assets", "--device", device, "--batch_size", 2, "--eval_pictures", 1, "--log_interval", 5, "--warmup_iters", 5)
    yield "training", python("train_flow.py", *small, "--max_iters", 50 if card else 5, "--eval_interval", 25 if card else 5, "--out_dir", Path(folder) / "flow",
                             *(() if card else ("--model", "tiny", "--image_size", 32))), 900
    yield "restoring", python("sample.py", "--t", 0.5, ROOT / "assets" / "cat.png", "-o", folder, "--device", device), 300


def run(command, limit):
    """(whether it ended well, its last 45 lines, seconds)."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=limit)
        well, text = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as e:
        text = e.stdout or ""  # bytes, on some systems
        well, text = False, (text if isinstance(text, str) else text.decode(errors="replace")) + f"\nnot done after {limit} s"
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]  # of a bar its last state
    return well, [line for line in lines if line][-45:], time.monotonic() - begin


def report(device, only):
    """Runs the parts whose title contains `only`, one after the other; prints the page and writes it to REPORT: whether all parts ended well."""
    table, pages = [], []
    with tempfile.TemporaryDirectory() as folder:
        todo = [part for part in parts(device, folder) if only in part[0]]
        for i, (title, command, limit) in enumerate(todo, 1):
            print(f"{i} of {len(todo)}: {title}", file=sys.stderr, flush=True)
            well, lines, seconds = run(command, limit)
            table.append((title, "ok" if well else "FAILED", duration(seconds)))
            shown = " ".join(part.replace(f"{ROOT}/", "").replace(sys.executable, "python") for part in command)
            pages.append("\n".join([f"**{title}**: `{shown.replace(folder, 'DIR')}`", "```", *(line.replace(folder, "DIR").replace(f"{ROOT}/", "") for line in lines), "```"]))
    if device == "cuda" and not shutil.which("compute-sanitizer"):
        table.append(("compute-sanitizer", "not here: it comes with the CUDA toolkit", ""))
    head = [f"### bench.py gpu, {time.strftime('%Y-%m-%d')}", "", *machine(device), "", "| part | result | time |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in table)]
    page = "\n".join(head) + "\n\n" + "\n\n".join(pages) + "\n"
    print(page)
    atomic_write(REPORT, lambda tmp: tmp.write_text(page))
    print(f"this page is in {REPORT}", file=sys.stderr)
    return all(result != "FAILED" for _, result, _ in table)
