"""pip install .                              a package `oftsr` and a command of that name; pure Python: needs no compiler, and no torch
                                              before it installs it; the kernels are built at their first use (kernels/build.py)
pip install -e .                              the same, running the files of this folder
pip install --no-build-isolation -e .         with the kernels built ahead of time, where there is a compiler
python setup.py build_ext --inplace           the kernels alone, beside their sources
"""
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def module_from(file):
    """A file as a module, without the folder's being on the path, where setuptools does not put it."""
    spec = importlib.util.spec_from_file_location("setup_" + file.stem.strip("_"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oftsr = module_from(ROOT / "oftsr" / "__init__.py")


class BuildPackage(build_py):
    """The flat files, rewritten to import each other from the package, and what they read: weights, lists, photographs."""

    def run(self):
        if self.editable_mode:  # oftsr/__init__.py finds them where they are
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # files of an older build would be packed too
        super().run()
        modules, package = oftsr.flat_modules(ROOT), Path(self.build_lib) / "oftsr"
        for name, file in modules.items():
            if file.parent == ROOT:
                (package / file.name).write_text(oftsr.rewrite(file.read_text(encoding="utf-8"), modules), encoding="utf-8")
        for file in [*ROOT.glob("*.html"), *ROOT.glob("*.js")]:  # the demo's page
            shutil.copy(file, package)
        for folder in ("weights", "assets"):
            shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("figures"), dirs_exist_ok=True)


def kernels():
    """The extension and the command that builds it; nothing where PyTorch or a compiler is missing, unless it was asked for."""
    build = module_from(ROOT / "kernels" / "build.py")
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
        f"oftsr.kernels.{build.library_name(cuda)}", [f"kernels/csrc/{Path(s).name}" for s in build.sources(cuda)],
        extra_compile_args={"cxx": build.cxx_flags(cuda), "nvcc": build.NVCC_FLAGS})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension, "build_py": BuildPackage}}


setup(**{
    "name": "oftsr",
    "version": module_from(ROOT / "console.py").VERSION,
    "description": "One-step flow for image super-resolution with tunable fidelity-realism trade-offs",
    "license": "MIT",
    "python_requires": ">=3.10",
    "packages": ["oftsr", "oftsr.kernels"],
    "package_dir": {"oftsr.kernels": "kernels"},
    "package_data": {"oftsr.kernels": ["csrc/*"]},
    "entry_points": {"console_scripts": ["oftsr = oftsr.sample:program"]},
    "cmdclass": {"build_py": BuildPackage},
    "install_requires": ["torch>=2.10", "numpy", "pillow>=10.1", "tifffile", "imagecodecs", "safetensors", "tqdm", "ninja", "lpips", "scipy"],
    "extras_require": {"test": ["pytest", "hypothesis", "matplotlib", "onnx", "onnxscript", "onnxruntime", "gradio>=6", "playwright", "clean-fid", "scikit-image", "pillow-heif", "tensorboard", "diffusers", "peft"], "iqa": ["pyiqa", "clean-fid", "setuptools<81"],  # the CLIP that pyiqa imports wants pkg_resources
                       "demo": ["gradio>=6"], "sd3": ["diffusers", "peft"], "export": ["onnx", "onnxscript"], "heif": ["pillow-heif"], "jxl": ["pillow-jxl-plugin"], "plot": ["matplotlib"], "boards": ["tensorboard", "wandb"]},
    **kernels(),
})
