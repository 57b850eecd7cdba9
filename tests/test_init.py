"""What the package gives out, and that it can be installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hf_poprisk

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def output(*command: Any, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trl_is_imported_for_the_names_that_need_it_alone() -> None:
    code = """
import sys, hf_poprisk
print(*dir(hf_poprisk))
hf_poprisk.PopRiskTrainer, hf_poprisk.PopRiskTrainingArguments, hf_poprisk.PopRiskAdamW
assert "trl" not in sys.modules
hf_poprisk.PopRiskDPOConfig
assert "trl" in sys.modules
"""
    assert {*hf_poprisk.__all__, "__version__"} <= set(output(sys.executable, "-c", code).split())


def test_the_version_is_the_projects() -> None:
    assert hf_poprisk.__version__ == PROJECT["project"]["version"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the project in a folder of the package's name, as `git clone` makes it."""
    folder = tmp_path / "hf_poprisk"
    shutil.copytree(ROOT / "hf_poprisk", folder / "hf_poprisk", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(kind: str, root: Path, out: Path) -> zipfile.ZipFile:
    """What pip does: ask the build backend of the folder for a wheel, "wheel" or "editable"."""
    backend = PROJECT["build-system"]["build-backend"]
    pytest.importorskip(backend.partition(".")[0])
    out.mkdir()
    code = f"import {backend} as backend, sys; print(backend.build_{kind}(sys.argv[1]))"
    return zipfile.ZipFile(out / output(sys.executable, "-c", code, out, cwd=root).splitlines()[-1])


def test_an_editable_install_is_found_from_above_the_clone(clone: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    with build("editable", clone, tmp_path / "wheel") as wheel:
        wheel.extractall(site)
    # what the package needs, without this environment's own installation of it
    (site / "zz_dependencies.pth").write_text("\n".join(p for p in sys.path if "-packages" in p))
    code = "import hf_poprisk; print(hf_poprisk.__file__, hf_poprisk.__version__, hf_poprisk.PopRiskAdamW)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = output(tmp_path / "venv/bin/python", "-c", code, cwd=clone.parent, env=environment).split()
    assert said[:2] == [str(clone / "hf_poprisk/__init__.py"), hf_poprisk.__version__]


def test_the_wheel_holds_the_package_and_nothing_else(clone: Path, tmp_path: Path) -> None:
    with build("wheel", clone, tmp_path / "wheel") as wheel:
        names = wheel.namelist()
    files = {str(p.relative_to(clone)) for p in clone.glob("hf_poprisk/**/*") if p.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == files and "hf_poprisk/py.typed" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
