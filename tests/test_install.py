"""The package `oftsr`: in a wheel and in a clone; nothing of a common name beside it, and nobody's data.py taken for ours."""
import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import oftsr
from console import VERSION
from pictures import read_image, read_note

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install .` puts into site-packages, read-only, and one with other people's modules of our names."""
    folder = tmp_path_factory.mktemp("install")
    clone = folder / "clone"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if not name.startswith(("tests/", "assets/figures/")) and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / "build" / "lib").mkdir(parents=True)
    (clone / "build" / "lib" / "data.py").write_text("left by an older build")
    code = "import setuptools.build_meta as b; print(b.build_wheel('.'))"  # as pip does, without its download of setuptools
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, env={**os.environ, "CXX": "no-such-compiler"})
    assert done.returncode == 0, done.stderr
    wheel = clone / done.stdout.split()[-1]
    site = folder / "site"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    for p in sorted(site.rglob("*"), reverse=True):
        p.chmod(0o555 if p.is_dir() else 0o444)
    theirs = folder / "theirs"
    theirs.mkdir()
    for name in oftsr.flat_modules(ROOT):
        (theirs / f"{name}.py").write_text(f"raise SystemExit('{name}.py of somebody else')")
    return site, theirs


def run(code, path, cwd, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(path), "OFTSR_KERNELS": "torch", **env})


def test_no_import_is_left_that_another_program_could_answer():
    """Every import of one of our modules, wherever it stands, goes to the package after rewriting."""
    modules = oftsr.flat_modules(ROOT)
    for file in [*modules.values(), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(oftsr.rewrite(file.read_text(), modules))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [n for n in names if n.split(".")[0] in modules], f"{file}, line {node.lineno}: one import a line, from the module itself"


def test_rewriting_touches_imports_alone():
    before = "from data import x\n    import data\nimport data as d\nfrom database import y\nimport database\ntext = 'import data here'\nfrom kernels.reference import z\nfrom . import data\n"
    after = "from oftsr.data import x\n    from oftsr import data\nfrom oftsr import data as d\nfrom database import y\nimport database\ntext = 'import data here'\nfrom oftsr.kernels.reference import z\nfrom . import data\n"
    assert oftsr.rewrite(before, ["data", "kernels"]) == after


def test_the_wheel_holds_one_package_with_its_weights_and_a_command(installed):
    site, _ = installed
    assert sorted(p.name for p in site.iterdir()) == ["oftsr", f"oftsr-{VERSION}.dist-info"]
    package = site / "oftsr"
    assert (package / "weights" / "photos_x4.safetensors").read_bytes() == (ROOT / "weights" / "photos_x4.safetensors").read_bytes()
    assert (package / "kernels" / "csrc" / "flow.h").is_file() and (package / "assets" / "cat.png").is_file() and not (package / "assets" / "figures").exists()
    assert {p.name for p in ROOT.iterdir() if p.suffix in (".py", ".html", ".js")} - {"setup.py"} <= {p.name for p in package.iterdir()}
    meta = site / f"oftsr-{VERSION}.dist-info"
    assert "oftsr = oftsr.sample:program" in (meta / "entry_points.txt").read_text()
    assert "Provides-Extra: heif" in (meta / "METADATA").read_text()


@pytest.mark.parametrize("how", ["wheel", "clone"])
def test_the_command_among_other_peoples_modules(how, installed, tmp_path):
    """In a folder full of their modules, which comes first on the path, and with nothing installed that can be written."""
    site, theirs = installed
    Image.fromarray(np.asarray(Image.open(ROOT / "assets" / "cat.png").convert("RGB"))[:20, :24]).save(tmp_path / "small.png")
    code = (f"import sys; sys.argv = ['oftsr', '--t', '1', '--device', 'cpu', '--dtype', 'float32', {str(tmp_path / 'small.png')!r}, '-o', {str(tmp_path / 'out')!r}]\n"
            "from oftsr.sample import program; sys.exit(program())")
    path = f"{theirs}{os.pathsep}{site if how == 'wheel' else ROOT}"
    # ROOT has the flat modules too: theirs stand before them, so that whoever imports one of these names gets the wrong one
    done = run(code, path, theirs)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "small_x4.png"
    assert read_image(out).shape == (80, 96, 3) and read_note(out)["weights"] == "photos_x4.safetensors"
    code = ("import oftsr, sys, numpy as np; assert 'torch' not in sys.modules; from oftsr import upscale\n"
            f"from PIL import Image; big = upscale(Image.open({str(tmp_path / 'small.png')!r}), t=1, device='cpu', dtype='float32')\n"
            f"assert np.array_equal(np.asarray(big), np.asarray(Image.open({str(out)!r}))); print(oftsr.__version__, oftsr.__file__)")
    done = run(code, path, theirs)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert version == VERSION and Path(file).is_relative_to(site if how == "wheel" else ROOT)


def test_version_and_help_are_quick_to_find(installed):
    site, theirs = installed
    for flag, words in (("--version", VERSION), ("--help", "--t ")):
        code = f"import sys; sys.argv = ['oftsr', '{flag}']\nfrom oftsr.sample import program\ntry: program()\nfinally: print('torch' in sys.modules)"
        done = run(code, f"{theirs}{os.pathsep}{site}", theirs)
        assert words in done.stdout and done.stdout.strip().endswith("False") and done.returncode == 0, done.stderr


def test_a_worker_process_finds_the_package(installed):
    """A spawned process, as Windows and macOS start them, imports what it is to run by its package's name."""
    site, theirs = installed
    code = ("import multiprocessing as m\nfrom oftsr.pictures import is_picture\n"
            "if __name__ == '__main__':\n    with m.get_context('spawn').Pool(1) as pool: print(pool.map(is_picture, ['a.png']))")
    (theirs.parent / "spawn.py").write_text(code)
    for path in (site, ROOT):
        done = subprocess.run([sys.executable, str(theirs.parent / "spawn.py")], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{theirs}{os.pathsep}{path}"})
        assert done.stdout.strip() == "[False]", done.stderr


def test_the_clone_keeps_its_own_bytecode_apart(tmp_path):
    """The same file is loaded as console and as oftsr.console: neither may take the other's bytecode."""
    code = "import console, oftsr.console, pictures, oftsr.pictures as p; print(p.InputError is oftsr.console.InputError, pictures.InputError is console.InputError, p.InputError is console.InputError)"
    for _ in range(2):
        assert run(code, ROOT, tmp_path).stdout.split() == ["True", "True", "False"]


def test_the_readme_names_the_installed_import_and_command():
    readme = (ROOT / "README.md").read_text()
    assert "from oftsr import upscale" in readme and re.search(r"^oftsr ", readme, re.MULTILINE) and "pip install ." in readme
