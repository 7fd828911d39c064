"""What suits the machine: precision, memory, processes."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machine


def test_bfloat16_is_taken_where_it_is_faster(monkeypatch, capsys):
    """With AMX, or avx512_bf16 on AMD; on Intel without AMX, and where there is neither, it is float32, and bfloat16 is said to be slower, once."""
    cpu, has = torch.device("cpu"), {}
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has["avx512"])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has["amx"])
    monkeypatch.setattr(machine, "cpu_info", lambda: f"vendor_id : {has['vendor']}")
    for avx512, amx, vendor, fast in ((False, False, "AuthenticAMD", False), (True, False, "AuthenticAMD", True), (True, False, "GenuineIntel", False), (True, True, "GenuineIntel", True)):
        has.update(avx512=avx512, amx=amx, vendor=vendor)
        machine.warn_once.cache_clear()
        assert machine.pick_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32) and machine.pick_dtype("float32", cpu) == torch.float32
        assert not capsys.readouterr().err
        assert machine.pick_dtype("bfloat16", cpu) == machine.pick_dtype("bfloat16", cpu) == torch.bfloat16
        assert capsys.readouterr().err.count("float32 is faster") == (not fast)


def test_the_processor_has_a_name(monkeypatch):
    """The system's, where it says one; else what Python knows."""
    monkeypatch.setattr(machine, "cpu_info", lambda: "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some Processor\nflags\t: fpu\n")
    assert machine.cpu_name().startswith("Some Processor, ")
    monkeypatch.setattr(machine, "cpu_info", lambda: "arm64")
    assert machine.cpu_name().startswith("arm64, ")


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """64 MiB forty times: by default 16,384 new pages each time (or 32 huge ones); kept, only until the heap has found its shape."""
    code = """if True:
        import resource, sys, torch
        from machine import keep_freed_memory
        if "keep" in sys.argv: keep_freed_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40): torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    run = lambda *args: int(subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout)
    assert 3 * run("keep") < run()


@pytest.mark.parametrize("error, short", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nframe #0: ..."), True), (RuntimeError("a bug"), False)])
def test_what_says_that_memory_did_not_suffice(error, short):
    assert machine.out_of_memory(error) == short
