"""The wheel holds what the repository holds, under one name, and works beside a user's own models/ folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxserve
from tests.source_tree import CONFIGS_PACKAGE, PACKAGE_FOLDERS, ROOT, shipped_files

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
SHIPPED = shipped_files()


def test_the_packages_list_is_the_disk():
    """The list is explicit (packages.find drops mapped packages), so a new folder needs a line there."""
    on_disk = {file.module for file in SHIPPED if file.path.name == "__init__.py"}
    folders = {file.module.rpartition(".")[0] for file in SHIPPED if file.path.name != "__init__.py"}
    assert folders <= on_disk, "a folder with modules lacks its __init__.py"
    assert set(SETUPTOOLS["packages"]) == on_disk | {CONFIGS_PACKAGE}


def test_mapped_folders_are_links_inside_the_package():
    mapped = SETUPTOOLS["package-dir"]
    assert set(mapped) == {*PACKAGE_FOLDERS.values(), CONFIGS_PACKAGE} - {"jaxserve"}
    for package, folder in mapped.items():
        link = ROOT / "jaxserve" / package.removeprefix("jaxserve.")
        assert link.is_symlink()
        assert os.readlink(link) == f"../{folder}", "links must be relative"
        assert link.resolve() == ROOT / folder


def test_every_data_file_of_the_configs_is_packed():
    patterns = SETUPTOOLS["package-data"][CONFIGS_PACKAGE]
    folder = ROOT / "configs"
    files = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files - {path for pattern in patterns for path in folder.glob(pattern)} == set()


def test_version_and_licence_are_told_once():
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "jaxserve.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxserve.__version__)
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_make_help_lists_the_targets_of_the_readme():
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["help", "install", "serve", "test", "check", "fix"]


# The kernels for Hopper say themselves that an older jax, as on Python 3.11, has no use for them.
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "The GPU kernels need jax" not in str(error):
            raise
"""


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_runs_beside_a_folder_called_models(tmp_path: Path):
    pytest.importorskip("setuptools", reason="setuptools is not installed, so no wheel can be built offline")
    source, home = tmp_path / "source", tmp_path / "home"
    source.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("jaxserve", *SETUPTOOLS["package-dir"].values()):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
        names = set(wheel.namelist())
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"jaxserve", f"jaxserve-{jaxserve.__version__}.dist-info"}
    modules = [file.module for file in SHIPPED]
    for file in SHIPPED:
        suffix = "/__init__.py" if file.path.name == "__init__.py" else ".py"
        assert file.module.replace(".", "/") + suffix in names

    (home / "models").mkdir(parents=True)
    (home / "models" / "__init__.py").write_text("OWNER = 'the user'\n")
    script = IMPORT_ALL + "import models, jaxserve; print(models.OWNER, jaxserve.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script, *modules]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"the user {tmp_path / 'site'}"), done.stderr
    command = [sys.executable, "-m", "jaxserve", "config", "--config", "tiny"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert f"model-path: {tmp_path / 'site' / 'jaxserve' / 'configs' / 'tiny'}\n" in done.stdout
