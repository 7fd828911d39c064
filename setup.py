from setuptools import setup

setup(
    name="oftsr",
    version="0.1.0",
    description="One-step flow for image super-resolution with tunable fidelity-realism trade-offs",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["model", "data", "sample", "evaluate", "train_flow", "distill"],
    packages=["kernels"],
    package_data={"kernels": ["csrc/*"]},
    install_requires=["torch", "numpy", "pillow", "safetensors", "tqdm", "ninja", "lpips", "scipy"],
    extras_require={"test": ["pytest", "matplotlib"], "plot": ["matplotlib"]},
)
