"""Finding and building the extension: ahead of time by setup.py, or at first use into a cache.

The library's name holds a hash of its sources, its flags and (for -march=native) the processor, so a library is
never used that does not belong to this source or this machine, be the cache on a disk shared by many.
Imports no torch at the top: setup.py reads this file where there may be none.
"""
import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent / "csrc"
MARCH = os.environ.get("OFTSR_MARCH", "native")  # x86-64-v3, say, for one library on many kinds of machines

# -O2, as -O3 takes twice as long to compile and gains nothing here: the loops that matter are marked "omp simd".
# No contraction of a * b + c: its rounding would differ from the reference's. The other flags let sqrt and selections be vectorised.
EXACT = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", f"-march={MARCH}", "-fopenmp-simd", *EXACT, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
if platform.machine() in ("x86_64", "AMD64"):
    CXX_FLAGS.append("-mprefer-vector-width=512")  # where the processor has it
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]


class MissingTool(EnvironmentError):
    """There is nothing to build with, or nowhere to build: the message says what would mend it."""


def sources(cuda):
    names = ["ops.cpp", "cpu.cpp", "cpu_norm.cpp", "cpu_conv.cpp", "cpu_damage.cpp"] + (["cuda.cu", "cuda_norm.cu"] if cuda else [])
    return [str(CSRC / name) for name in names]


def cxx_flags(cuda):
    return CXX_FLAGS + (["-DUSE_CUDA"] if cuda else [])


def processor():
    """The processor's instruction sets, which -march=native compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()


def library_name(cuda):
    """oftsr_<hash>: what the library is made of, less PyTorch, whose stable ABI it uses."""
    made_of = [platform.machine(), processor() if MARCH == "native" else "", *cxx_flags(cuda), *NVCC_FLAGS]
    made_of += [f.name + f.read_text() for f in sorted(CSRC.iterdir()) if f.suffix in (".h", ".cpp", ".cu")]
    return "oftsr_" + hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16] + ("_cuda" if cuda else "")


def compiler():
    """The C++ compiler, or MissingTool."""
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(cxx.split()[0]) is None:
        raise MissingTool(f"no C++ compiler ({cxx} is not on the PATH): install one (apt-get install g++), or name it in CXX")
    return cxx


def ninja():
    """Sees to it that ninja is on the PATH, or raises MissingTool."""
    if shutil.which("ninja") is None:
        try:
            from ninja import BIN_DIR
        except ImportError:
            raise MissingTool("no ninja: install it (pip install ninja)") from None
        os.environ["PATH"] = BIN_DIR + os.pathsep + os.environ["PATH"]


def cuda_home():
    """The CUDA toolkit, if PyTorch is a CUDA build and a toolkit is here, else None.

    cpp_extension takes the folder above nvcc's, which is wrong where the nvcc on the PATH is a script that calls another.
    """
    import torch
    nvcc = shutil.which("nvcc")
    for home in filter(None, (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")):
        runtime = [*Path(home).glob("lib*/libcudart.so"), *Path(home).glob("targets/*/lib/libcudart.so")]
        if torch.version.cuda and runtime and (Path(home) / "bin" / "nvcc").exists():
            return str(home)
    return None


def use_cuda_home():
    """Tells cpp_extension where the toolkit is, which it asks once, when it is imported; returns whether there is one."""
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home
        from torch.utils import cpp_extension
        cpp_extension.CUDA_HOME = home  # somebody may have imported it before
    return home is not None


def ahead_of_time(cuda):
    """The library that setup.py left beside this file, or None. One with CUDA serves a machine without, too."""
    for with_cuda in (True, False) if not cuda else (True,):
        for path in CSRC.parent.glob(library_name(with_cuda) + ".*"):
            return path


def cache(cuda):
    import torch
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    target = ""
    if cuda:
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        target = "_" + os.environ.get("TORCH_CUDA_ARCH_LIST", str(sorted(capabilities)))
        target = "_sm" + "".join(ch if ch.isdigit() else "_" for ch in target).strip("_")
    return Path(root) / f"torch{torch.__version__}" / (library_name(cuda) + target)


def load(cuda):
    """Loads the library into torch.ops.oftsr, building it first if need be; returns its path.

    Raises MissingTool if there is nothing to build with, and RuntimeError with the compiler's words if the build fails.
    """
    import torch
    if path := ahead_of_time(cuda):
        torch.ops.load_library(path)
        return path
    folder = cache(cuda)
    path = folder / "oftsr.so"
    if not path.exists():
        build(folder, path, cuda)
    torch.ops.load_library(path)
    return path


def build(folder, path, cuda):
    from filelock import FileLock  # comes with torch; the system frees it when its process dies, however it dies
    compiler()
    ninja()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.lock").touch()
    except OSError as e:
        raise MissingTool(f"cannot write {folder} ({e.strerror}): name a folder that can be written in TORCH_EXTENSIONS_DIR") from None
    with FileLock(folder / "build.lock"):
        if path.exists():  # another process was first
            return
        from torch.utils import cpp_extension
        if cuda:
            use_cuda_home()
        print(f"kernels: building the extension, once, in {folder}", file=sys.stderr, flush=True)
        (folder / "lock").unlink(missing_ok=True)  # cpp_extension's own, which outlives a killed process
        cpp_extension.load("oftsr_build", sources(cuda), extra_cflags=cxx_flags(cuda), extra_cuda_cflags=NVCC_FLAGS,
                           build_directory=str(folder), with_cuda=cuda, is_python_module=False)
        os.replace(folder / "oftsr_build.so", path)  # whole, or not there at all
