"""What is installed is what lies in the folders, and importing it loads no more than it must."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import qgnn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
# Import name of each top folder of the distribution; {"qgnn": "qgnn", "qgnn.kernels": "kernels", ...}.
TOP = {"qgnn": "qgnn", **SETTINGS["setuptools"]["package-dir"]}


def sources() -> dict[str, Path]:
    """Every Python file of the distribution, by its path in the wheel; the links inside qgnn/ are not followed."""
    found = {}
    for name, folder in TOP.items():
        for directory, _, files in os.walk(ROOT / folder):
            for file in (Path(directory, f) for f in files if f.endswith(".py")):
                inside = file.relative_to(ROOT / folder)
                found[f"{name.replace('.', '/')}/{inside.as_posix()}"] = file
    return found


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Output of ``code`` in an interpreter of its own, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_are_the_folders_on_disk() -> None:
    folders = {str(Path(path).parent).replace("/", ".") for path in sources()}
    packages = SETTINGS["setuptools"]["packages"]
    assert sorted(folders) == sorted(packages)
    assert len(packages) == len(set(packages))
    initialised = {str(Path(path).parent).replace("/", ".") for path in sources() if path.endswith("/__init__.py")}
    assert folders == initialised, "a folder of modules has no __init__.py"


@pytest.mark.parametrize("name", sorted(set(TOP) - {"qgnn"}))
def test_links_are_relative_and_tracked(name: str) -> None:
    link = ROOT / name.replace(".", "/")
    assert link.is_symlink()
    assert link.readlink() == Path("..", TOP[name])
    if not (ROOT / ".git").exists():
        pytest.skip("a source tree without its history: what git tracks cannot be asked")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", str(link.relative_to(ROOT))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.startswith("120000 "), "git does not track it as a link"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked: a folder to put on the path."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def test_wheel_holds_the_sources_and_nothing_beside_qgnn(site: Path) -> None:
    (metadata,) = site.glob("qgnn-*.dist-info")
    assert {path.name for path in site.iterdir()} == {"qgnn", metadata.name}
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.py")} == set(sources())
    assert (site / "qgnn/py.typed").is_file()
    tuned = {path.name for path in (ROOT / "kernels/gpu").glob("tuned/*.json")}
    assert {path.name for path in (site / "qgnn/kernels/gpu").glob("tuned/*.json")} == tuned
    assert "qgnn = qgnn.cli:main" in (metadata / "entry_points.txt").read_text(encoding="utf-8")


def test_wheel_imports_far_from_a_checkout(site: Path, tmp_path: Path) -> None:
    code = """
import importlib, os, sys
site, *modules = sys.argv[1:]
sys.path.insert(0, site)
import warnings
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # PyG, when it is imported
for name in modules:
    module = importlib.import_module(name)
    assert os.path.realpath(module.__file__).startswith(site + os.sep), module.__file__
print(len(modules))
"""
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources()]
    names = sorted(name for name in names if not name.endswith("__main__"))
    environment = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert int(run_python(code, str(site.resolve()), *names, **environment)) == len(names)


def test_import_qgnn_loads_no_heavy_library() -> None:
    code = "import sys, qgnn; print({'torch', 'triton', 'numba', 'torch_geometric', 'numpy'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_import_accel_loads_no_torch() -> None:
    code = "import sys, qgnn.accel; print({'torch', 'triton', 'numba', 'torch_geometric'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_import_touches_no_gpu_and_loads_no_backend() -> None:
    code = """
import sys, torch, qgnn.ops, qgnn.kernels.aggregate, qgnn.kernels.matmul, qgnn.kernels.quantize
print({name for name in sys.modules if name.startswith(("qgnn.kernels.gpu.", "qgnn.kernels.cpu."))})
print({"triton", "numba", "torch_geometric"} & set(sys.modules), torch.cuda.is_initialized())
"""
    assert run_python(code).split("\n")[:2] == ["set()", "set() False"]


def test_public_names() -> None:
    modules = {"accel", "data", "kernels", "nn", "ops", "quant", "train"}
    callables = {
        "Graph",
        "QTensor",
        "QuantizedFeatureStore",
        "calibrate",
        "convert",
        "export_workload",
        "freeze",
        "load",
        "patch_pyg",
        "save",
    }
    callables |= {"use_backend"}
    assert set(qgnn.__all__) == modules | callables | {"__version__"}
    assert set(qgnn.__all__) <= set(dir(qgnn))
    assert all(isinstance(getattr(qgnn, name), ModuleType) for name in modules)
    assert all(callable(getattr(qgnn, name)) for name in callables)
    nonsense = "nonsense"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(qgnn, nonsense)


@pytest.mark.parametrize("name", ["convert", "freeze"])
@pytest.mark.parametrize(
    "first", ["", "import qgnn.{0}", "from qgnn.{0} import {0}", "import qgnn.freeze, qgnn.convert"]
)
def test_functions_named_like_their_module_stay_functions(name: str, first: str) -> None:
    code = f"""
import warnings
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # PyG, when it is imported
import importlib, sys, types, qgnn
{first.format(name)}
assert isinstance(qgnn.{name}, types.FunctionType), qgnn.{name}
from qgnn import {name}
assert {name} is importlib.import_module("qgnn.{name}").{name} is qgnn.{name}
assert isinstance(sys.modules["qgnn.{name}"], types.ModuleType)
"""
    run_python(code)


@pytest.mark.parametrize("name", ["kernels", "accel", "perf", "pickle"])
@pytest.mark.parametrize("statement", ["import {0}", "from {0} import thing", "import {0}.thing"])
def test_banned_imports_are_refused(name: str, statement: str) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "qgnn/snippet.py", "-"],
        cwd=ROOT,
        input=f"{statement.format(name)}\n",
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 1, checked.stderr
    assert "TID251" in checked.stdout


def test_every_environment_variable_is_documented() -> None:
    """A string that is all of a variable's name is a use of it."""
    used = set()
    for path in [*sources().values(), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.update(re.findall(r"^(?:QGNN|TRITON|NUMBA)_[A-Z_]+$", node.value))
    documented = re.findall(
        r"^\| `([A-Z_]+)` \|", (ROOT / "docs/environment.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert used <= set(documented)
