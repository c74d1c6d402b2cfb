"""What an installation carries, proven on a wheel built from a copy of the tree and installed elsewhere."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.house import rules

PACKAGES = ("config_schema", "ops", "profiler", "engine", "sample_configs")
DISTRIBUTION = "slipstream_runtime"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; built in a copy, since setuptools leaves build/ and *.egg-info where it works."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "scripts"):  # there, so that packaging them by mistake would show
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        "out",
    ]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode("utf-8")


def test_wheel_carries_every_module(names):
    assert {source.path for source in rules.read_sources(ROOT, PACKAGES)} <= names


@pytest.mark.parametrize(
    "pattern",
    [
        "config_schema/schema/*.json",
        "sample_configs/*.json",
        "ops/csrc/*.cu",
        "ops/csrc/*.cuh",
        "profiler/*.json",
        "profiler/page/*.*",
        "*/py.typed",
    ],
)
def test_wheel_carries_the_other_files(names, pattern):
    wanted = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.relative_to(ROOT).match(pattern)
    }
    assert wanted <= names
    assert wanted or pattern.startswith("ops/csrc/")


def test_typed_packages_say_so(names):
    assert {f"{package}/py.typed" for package in ("config_schema", "ops", "profiler", "engine")} <= names


def test_wheel_installs_nothing_else(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_metadata(wheel):
    metadata = email.message_from_string(read(wheel, ".dist-info/METADATA"))
    (version,) = re.findall(r'^VERSION = "(.*)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert metadata["Version"] == version
    assert wheel.name.startswith(f"{DISTRIBUTION}-{version}-py3-none-any")
    required = [value.split(";")[0].strip() for value in metadata.get_all("Requires-Dist")]
    assert not [name for name in required if re.match(r"cupy($|[^-])", name)], "plain cupy has no wheels"
    assert {"cuda12", "cuda13", "gguf", "report", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert "slipstream = engine.cli:main" in read(wheel, ".dist-info/entry_points.txt")


def test_the_pinned_torch_satisfies_the_bounds(wheel):
    from packaging.requirements import Requirement

    (pin,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    required = [
        Requirement(value) for value in email.message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist")
    ]
    (torch,) = (one for one in required if one.name == "torch")
    assert torch.specifier.contains(pin)
    assert all(torch.specifier.contains(version) for version in ("2.11.0", "2.12.1", "2.13.0"))


def test_installed_elsewhere_the_data_files_are_found(wheel, tmp_path):
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    program = (
        "import importlib.resources as r, json, config_schema, sample_configs\n"
        "folder = r.files('sample_configs')\n"
        "names = sorted(f.name for f in folder.iterdir() if f.name.endswith('.json'))\n"
        "for name in names: config_schema.load_config(json.loads(folder.joinpath(name).read_text()))\n"
        "print(config_schema.__file__, config_schema.SCHEMA_PATH, *names)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    module, schema, *samples = done.stdout.split()
    assert Path(module).is_relative_to(target)
    assert Path(schema).is_file()
    assert samples == sorted(file.name for file in (ROOT / "sample_configs").glob("*.json"))


def test_the_version_is_said_once():
    literal = re.compile(r"^\s*(__version__|VERSION)\s*(:.*)?=\s*[\"']\d", re.MULTILINE)
    sources = rules.read_sources(ROOT, PACKAGES)
    assert not [source.path for source in sources if literal.search(source.text)]
