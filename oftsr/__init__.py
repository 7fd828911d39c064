"""OFTSR as an installed package: `from oftsr import upscale`, the command `oftsr`, `python -m oftsr.evaluate`.

Its modules are the flat files of the repository, with their imports of each other rewritten: `from model import UNet` becomes
`from oftsr.model import UNet`, so that nobody's data.py or model.py is taken for ours, nor ours for theirs. A wheel has them
rewritten beside this file (setup.py). In a clone they stand one folder up, and are rewritten as they are loaded.
"""
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent  # the repository, or site-packages


def flat_modules(clone):
    """The modules in a clone that belong into this package, by name: {name: file}."""
    files = {p.stem: p for p in sorted(clone.glob("*.py")) if p.stem != "setup"}
    return {**files, "kernels": clone / "kernels" / "__init__.py"}


def rewrite(source, names):
    """Python source whose imports of the modules `names` are imports from this package."""
    names = "|".join(names)
    source = re.sub(rf"^([ \t]*)from ({names})(?=[. ][\w. ]*import\b)", r"\1from oftsr.\2", source, flags=re.MULTILINE)
    return re.sub(rf"^([ \t]*)import ({names})(?=[ \t]*$|[ \t]+(?:as|#))", r"\1from oftsr import \2", source, flags=re.MULTILINE)


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data, path, **how):
        return super().source_to_code(rewrite(importlib.util.decode_source(data), flat_modules(CLONE)), path, **how)

    def path_stats(self, path):
        raise OSError("no bytecode is kept: __pycache__ beside the file is that of the file as it stands")


class _Finder:
    """Finds oftsr.NAME in the clone."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, module = name.partition(".")
        file = flat_modules(CLONE).get(module) if package == __name__ else None
        if file is None:
            return None
        folder = [str(file.parent)] if file.stem == "__init__" else None
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file)), submodule_search_locations=folder)


if not Path(__file__).with_name("sample.py").exists():
    sys.meta_path.append(_Finder)


def __getattr__(name):
    if name == "upscale":  # not imported above, as it brings PyTorch with it
        from oftsr.sample import upscale
        return upscale
    if name == "__version__":
        from oftsr.console import VERSION
        return VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
