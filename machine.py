"""The machine a program runs on: its device, the precision that suits it, its memory, the other processes that torchrun started."""
import ctypes
import functools
import os
import platform
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from console import InputError


def pick_device(name="auto"):
    """auto is the first that is there of cuda, mps, cpu; under torchrun each process takes its own GPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("there are cuda, mps and cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"no device {name!r} here: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name, device):
    """The one precision rule: auto is bfloat16 where the device multiplies faster in it, else float32; parameters stay float32."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else device.type == "cpu" and gains_by_bf16()
    if name == "bfloat16" and not fast:
        warn_once("float32 is faster than bfloat16 on this machine (--dtype auto takes it)")
    return getattr(torch, name) if name != "auto" else torch.bfloat16 if fast else torch.float32


def gains_by_bf16():
    """Whether this processor makes more products a second in bfloat16 than in float32: with AMX, or AMD's with avx512_bf16.

    Intel's avx512_bf16 without AMX (as virtual machines may hide it) was measured to be the slower of the two (LOG.md).
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and "GenuineIntel" not in cpu_info()


def cpu_info():
    """What the system says of its processors: /proc/cpuinfo, or a line where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()


def cpu_name():
    """The processor as the system calls it, and the widest instructions that torch uses on it."""
    text = cpu_info()
    found = re.search(r"model name\s*: (.*)", text)
    return f"{found[1] if found else text.splitlines()[0]}, {torch.backends.cpu.get_cpu_capability()}"


def out_of_memory(error):
    """Whether an exception says that memory did not suffice: on a CPU PyTorch has no class for that."""
    words = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and (
        "allocate memory" in words or "bad_alloc" in words or "out of memory" in words)


@functools.lru_cache(maxsize=None)
def warn_once(words):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(words, file=sys.stderr, flush=True)


def join_processes(backend="gloo", **how):
    """Join the other processes that torchrun started; how: init_process_group's. Raises InputError where they do not meet: no such backend, a port in use, no answer."""
    try:
        rank, world = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE"))
        store, _, _ = next(dist.rendezvous("env://", rank, world, **how))
        # After torchrun --max-restarts the store may still say where the processes of the life before listened.
        store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, **how)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot join the others: {str(e).splitlines()[0]}") from None


def keep_freed_memory():
    """Have the C library (glibc; elsewhere nothing happens) keep for the next layer what a layer frees. For whole programs.

    By default it hands large blocks back to the system at once and takes them anew, zeroed page by page: a tenth of
    a training step on a CPU, and a third of the published network's time in float32 (LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap...
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ...which shrinks only when so much of its end is free
