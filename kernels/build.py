"""Finding and building the extension: ahead of time by setup.py, or at first use into a cache.

The library's name holds a hash of its sources, its flags and (for -march=native) the processor, so a library is
never used that does not belong to this source or this machine, be the cache on a disk shared by many.
Imports no torch at the top: setup.py reads this file where there may be none.
"""
import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, suppress
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
    """The C++ compiler that CXX names and the flags beside it, or MissingTool. ccache and its like are left out: PyTorch adds one that is there."""
    words = shlex.split(os.environ.get("CXX", "c++"), posix=os.name == "posix") or ["c++"]
    cxx, *flags = [w for w in words if Path(w).stem not in ("ccache", "sccache", "distcc", "icecc")] or ["c++"]
    if shutil.which(cxx) is None:
        raise MissingTool(f"no C++ compiler ({cxx} is not on the PATH): install one (apt-get install g++), or name it in CXX")
    return cxx, flags


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
    try:
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    except RuntimeError:  # no HOME, and nobody in the list of users
        raise MissingTool("there is no home folder to build in: name a folder that can be written in TORCH_EXTENSIONS_DIR") from None
    target = ""
    if cuda:
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        target = "_" + os.environ.get("TORCH_CUDA_ARCH_LIST", str(sorted(capabilities)))
        target = "_sm" + "".join(ch if ch.isdigit() else "_" for ch in target).strip("_")
    return Path(root) / f"torch{torch.__version__}" / (library_name(cuda) + target)


def load(cuda, again=False):
    """Loads the library into torch.ops.oftsr, building it first if need be; returns its path.

    Raises MissingTool if there is nothing to build with, if what there is cannot build (its `from` has the compiler's
    words), or if the library cannot be loaded where it lies. What failed to build is not tried again, unless `again`.
    """
    import torch
    path = ahead_of_time(cuda)
    if path is None:
        folder = cache(cuda)
        path = folder / "oftsr.so"
        if not path.exists():
            build(folder, path, cuda, again)
    try:
        torch.ops.load_library(path)
    except OSError as e:
        raise MissingTool(cannot_load(path, e)) from e
    return path


def cannot_load(path, error):
    return f"{path} cannot be loaded ({str(error).splitlines()[0]}): if programs may not run from there, name another folder in TORCH_EXTENSIONS_DIR"


def build(folder, path, cuda, again):
    cxx, flags = compiler()
    ninja()
    failed = folder / "failed"
    made_with = f"{shutil.which(cxx)} {os.stat(shutil.which(cxx)).st_mtime_ns} {flags}"
    if not again and failed.is_file() and failed.read_text().startswith(made_with + "\n"):
        raise MissingTool(failed.read_text().split("\n")[1] + f" (as before; without {failed} it is tried again)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix="build-", dir=folder)  # of this process alone: without a lock several may build
    except OSError as e:
        raise MissingTool(f"cannot write {folder} ({e.strerror}): name a folder that can be written in TORCH_EXTENSIONS_DIR") from None
    try:
        with sign_of_life(), one_at_a_time(folder / "build.lock") as alone:
            if not path.exists():  # else another process was first
                if alone:
                    clear_dead(folder)
                print(f"kernels: building the extension, once, in {folder} (some seconds; a minute or more on a busy machine)", file=sys.stderr, flush=True)
                compile_in(work, cxx, flags, cuda)
                os.replace(Path(work) / "oftsr_build.so", path)  # whole, or not there at all
                failed.unlink(missing_ok=True)
    except Exception as e:  # cpp_extension's RuntimeError, and whatever it stumbles over with a compiler that it does not know
        why = cannot_load(folder, e) if isinstance(e, OSError) else f"the C++ compiler {cxx} cannot build it ({gist(str(e))}); OFTSR_KERNELS=ext shows all that it says"
        with suppress(OSError):
            failed.write_text(f"{made_with}\n{why}\n")
        raise MissingTool(why) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clear_dead(folder):
    """Removes what builds that were killed left. Whoever waits for the lock has only an empty folder yet, and is left it."""
    for left in folder.glob("build-*/*"):
        shutil.rmtree(left.parent, ignore_errors=True)


def gist(words):
    """The line of a compiler's many that says what is wrong."""
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["no word of why"]
    told = [line for line in lines[1:] if " -isystem " not in line and not line.startswith(("FAILED", "ninja:"))] or lines[-1:]
    return next((line for line in told if "error" in line.lower()), told[0])[:200]


def compile_in(work, cxx, flags, cuda):
    os.environ["CXX"] = cxx
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its guesses at CUDA_HOME and at the compiler's kind
    from torch.utils import cpp_extension
    if cuda:
        use_cuda_home()
    cpp_extension.load("oftsr_build", sources(cuda), extra_cflags=cxx_flags(cuda) + flags, extra_cuda_cflags=NVCC_FLAGS,
                       build_directory=work, with_cuda=cuda, is_python_module=False)


@contextmanager
def one_at_a_time(lock):
    """Other processes that would build wait here, and find it done; gives whether it is so: where the file system has no locks, each builds for itself."""
    from filelock import FileLock, Timeout  # comes with torch; the system frees it when its process dies, however it dies
    held = FileLock(lock)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a lock of another kind is taken
            held.acquire(timeout=600)  # a lock that outlived its process, where there is no flock
    except (Timeout, OSError, NotImplementedError):
        pass
    try:
        yield held.is_locked
    finally:
        held.release()


@contextmanager
def sign_of_life():
    """A line every ten seconds, as long as it takes."""
    done, start = threading.Event(), time.time()

    def speak():
        while not done.wait(10):
            print(f"kernels: still building, {time.time() - start:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        done.set()
