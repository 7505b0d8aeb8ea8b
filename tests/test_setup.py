"settings.ini, requirements.txt and environment.yml agree; the scripts refuse what cannot work in one line."
import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT/"settings.ini")
REQUIRED = [Requirement(r) for key in ("requirements", "dev_requirements") for r in CONFIG["DEFAULT"][key].split()]
LOCK = dict(line.strip().split("==") for line in (ROOT/"requirements.txt").read_text().splitlines() if line.strip() and not line.startswith("#"))
LOCK = {name.lower().replace("_", "-"): version for name, version in LOCK.items()}


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_the_lock_satisfies_settings(requirement):
    version = LOCK.get(requirement.name.lower().replace("_", "-"))
    assert version, f"{requirement.name} is not in requirements.txt: make lock"
    assert version in requirement.specifier


def test_conda_takes_the_same_lock_and_python():
    environment = yaml.safe_load((ROOT/"environment.yml").read_text())
    assert f"python={CONFIG['DEFAULT']['min_python']}" in environment["dependencies"]
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_pyproject_does_not_repeat_what_settings_say():
    assert "project" not in tomllib.loads((ROOT/"pyproject.toml").read_text())


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    for name in ("setup.py", "settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, tmp_path)
    for name in ("mmqlora", "tests"): shutil.copytree(ROOT/name, tmp_path/name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, tmp_path], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mmqlora/quickstart.py" in names
    assert {n.split("/")[0] for n in names} == {"mmqlora", f"mmqlora-{CONFIG['DEFAULT']['version']}.dist-info"}


def refused(script, **environment):
    "stderr of a script that must fail; it runs in a copy of the repository's scripts, away from .venv."
    ran = subprocess.run(["/bin/bash", script], capture_output=True, text=True, env={**os.environ, **environment})
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1, ran.stderr
    return ran.stderr


@pytest.fixture
def scripts(tmp_path):
    "A folder with the scripts and the lock, as in a fresh clone."
    for name in ("scripts/setup.sh", "scripts/latex.sh", "requirements.txt", "settings.ini"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes((ROOT/name).read_bytes())
    return tmp_path/"scripts"


def test_an_old_python_is_refused_and_nothing_is_written(scripts, tmp_path):
    old = tmp_path/"python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    assert "Python 3.8.1" in refused(scripts/"setup.sh", PYTHON=str(old))
    assert not (tmp_path/".venv").exists()


def test_too_little_disk_is_refused_and_nothing_is_written(scripts, tmp_path):
    assert "1000000 GB needed" in refused(scripts/"setup.sh", NEED_GB="1000000", PYTHON=sys.executable)
    assert not (tmp_path/".venv").exists()


def test_missing_latex_names_the_packages_where_we_may_not_install_them(scripts, tmp_path):
    (tmp_path/"id").write_text("#!/bin/sh\necho 1000\n")                # not root, and nothing else on the PATH
    (tmp_path/"id").chmod(0o755)
    assert "texlive-publishers" in refused(scripts/"latex.sh", PATH=str(tmp_path))
