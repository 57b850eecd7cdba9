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
assert not {"hf_poprisk.trl_experimental", "hf_poprisk.trl_online"} & sys.modules.keys()
for name in hf_poprisk.__all__:
    getattr(hf_poprisk, name)
"""
    assert {*hf_poprisk.__all__, "__version__"} <= set(output(sys.executable, "-c", code).split())


def test_the_version_is_the_projects() -> None:
    assert hf_poprisk.__version__ == PROJECT["project"]["version"]


def test_what_is_built_holds_the_package_and_is_found(tmp_path: Path) -> None:
    """As pip does it: a wheel, and an editable install in a clone of the package's name, seen from above."""
    backend, clone = PROJECT["build-system"]["build-backend"], tmp_path / "hf_poprisk"
    pytest.importorskip(backend.partition(".")[0])
    shutil.copytree(ROOT / "hf_poprisk", clone / "hf_poprisk", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)

    def build(kind: str) -> zipfile.ZipFile:
        code = f"import {backend} as backend, sys; print(backend.build_{kind}(sys.argv[1]))"
        (tmp_path / kind).mkdir()
        name = output(sys.executable, "-c", code, tmp_path / kind, cwd=clone).splitlines()[-1]
        return zipfile.ZipFile(tmp_path / kind / name)

    names = build("wheel").namelist()
    files = {str(p.relative_to(clone)) for p in clone.glob("hf_poprisk/**/*") if p.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == files and "hf_poprisk/py.typed" in files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv")
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    build("editable").extractall(site)
    # what the package needs, without this environment's own installation of it
    (site / "zz_dependencies.pth").write_text("\n".join(p for p in sys.path if "-packages" in p))
    code = "import hf_poprisk; print(hf_poprisk.__file__, hf_poprisk.__version__, hf_poprisk.PopRiskAdamW)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = output(tmp_path / "venv/bin/python", "-c", code, cwd=tmp_path, env=environment).split()
    assert said[:2] == [str(clone / "hf_poprisk/__init__.py"), hf_poprisk.__version__]
