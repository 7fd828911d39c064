"""pip install -e .                           pure Python: needs no compiler, and no torch before it installs it;
                                              the kernels are built at their first use (kernels/build.py)
pip install --no-build-isolation -e .         with the kernels built ahead of time, where there is a compiler
python setup.py build_ext --inplace           the kernels alone, beside their sources
"""
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup


def kernels():
    """The extension and the command that builds it; nothing where PyTorch or a compiler is missing, unless it was asked for."""
    spec = importlib.util.spec_from_file_location("build_kernels", Path(__file__).parent / "kernels" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        import torch
        build.compiler()
        cuda = build.use_cuda_home()
        if cuda and not torch.cuda.device_count():  # no card to ask what it is: Ampere, Hopper, and what comes after
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except (ImportError, build.MissingTool) as e:
        if "build_ext" in sys.argv:
            sys.exit(f"the kernels cannot be built: {e}")
        return {}
    extension = (CUDAExtension if cuda else CppExtension)(
        f"kernels.{build.library_name(cuda)}", [f"kernels/csrc/{Path(s).name}" for s in build.sources(cuda)],
        extra_compile_args={"cxx": build.cxx_flags(cuda), "nvcc": build.NVCC_FLAGS})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="oftsr",
    version="0.1.0",
    description="One-step flow for image super-resolution with tunable fidelity-realism trade-offs",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["console", "model", "pictures", "degradations", "folders", "data", "flow", "tiles", "batch", "sample", "metrics", "evaluate", "training", "perceptual", "train_flow", "distill", "resshift", "teachers", "ablate", "claims"],
    packages=["kernels"],
    package_data={"kernels": ["csrc/*"]},
    install_requires=["torch>=2.10", "numpy", "pillow>=10.1", "tifffile", "imagecodecs", "safetensors", "tqdm", "ninja", "lpips", "scipy"],
    extras_require={"test": ["pytest", "matplotlib"], "heif": ["pillow-heif"], "jxl": ["pillow-jxl-plugin"], "plot": ["matplotlib"]},
    **kernels(),
)
