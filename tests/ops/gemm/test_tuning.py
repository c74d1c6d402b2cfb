"""Tables of tuned configs: what is found where, broken files, and tuning from end to end (in the interpreter)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from ops.errors import KernelError
from ops.gemm import GemmConfig, skinny_gemm, timing, tune, tuning
from ops.gemm.__main__ import main
from ops.gemm.config import BUCKETS, bucket, candidates, heuristic, key
from ops.gemm.tuning import choose, read_table, remember, table_name, tuned, user_table, write_table
from ops.weights import Norm
from tests.ops.specs import noise

DEVICE = "Some GPU 80GB"
ONE, OTHER = GemmConfig("fma", 2, 64, 2), GemmConfig("ring", 16, 32, 4, slices=4, stages=3)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tunes CPU tensors, which only the interpreter runs")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's and the shipped tables in directories of their own."""
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning._tuned.cache_clear()
    return tmp_path


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / table_name(DEVICE)
    configs = {key(torch.float16, 1, 5, 8, False, True): ONE, key(torch.bfloat16, 3, 5, 8, True, False): OTHER}
    write_table(path, DEVICE, configs)
    assert read_table(path) == configs
    assert json.loads(path.read_text())["device"] == DEVICE
    assert [file.name for file in path.parent.iterdir()] == ["some_gpu_80gb.json"]


def test_no_table_is_an_empty_one(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"version": 2, "configs": {}}',
        '{"version": 1}',
        '{"version": 1, "configs": {"a": {"kind": "fma"}}}',
        '{"version": 1, "configs": {"a": {"kind": "fma", "block_n": 3, "block_k": 64}}}',
        '{"version": 1, "configs": {"a": {"kind": "fma", "block_n": 2, "block_k": 64, "colour": 1}}}',
        '{"version": 1, "configs": []}',
    ],
)
def test_a_broken_table(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named where it is read; the user's is passed over with a warning, and the shipped one still counts."""
    name = key(torch.float16, 1, 5, 8, False, False)
    write_table(tmp_path / "shipped" / table_name(DEVICE), DEVICE, {name: ONE})
    path = user_table(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(KernelError, match=r"some_gpu_80gb\.json: not a table"):
        read_table(path)
    with caplog.at_level(logging.WARNING):
        assert tuned(DEVICE) == {name: ONE}
    assert "some_gpu_80gb.json" in caplog.text


def test_a_broken_user_table_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    path = user_table(DEVICE)
    path.parent.mkdir(parents=True)
    path.write_text("broken")
    with caplog.at_level(logging.WARNING):
        remember(DEVICE, {"a": ONE})
    assert read_table(path) == {"a": ONE}
    assert "begun anew" in caplog.text


def test_a_table_that_cannot_be_read_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    user_table(DEVICE).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert tuned(DEVICE) == {}
    assert "not used" in caplog.text


def test_the_users_table_goes_before_the_shipped_one(tmp_path: Path) -> None:
    write_table(tmp_path / "shipped" / table_name(DEVICE), DEVICE, {"a": ONE, "b": ONE})
    assert tuned(DEVICE) == {"a": ONE, "b": ONE}
    remember(DEVICE, {"b": OTHER})
    remember(DEVICE, {"c": OTHER})
    assert tuned(DEVICE) == {"a": ONE, "b": OTHER, "c": OTHER}


def test_without_the_variable_tables_lie_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLIPSTREAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_table(DEVICE) == tmp_path / ".cache" / "slipstream" / "gemm" / "some_gpu_80gb.json"


@interpreted
def test_what_is_chosen() -> None:
    x = torch.zeros(3, 8, dtype=torch.float16)
    assert choose(x, 5, False, True) == heuristic(torch.float16, 3, 5, 8, False)
    remember("interpreter", {key(torch.bfloat16, 4, 5, 8, False, False): ONE})
    assert choose(x, 5, False, True) == ONE  # the other 16-bit dtype, without the norm, is near enough
    remember("interpreter", {key(torch.float16, 4, 5, 8, False, True): OTHER})
    assert choose(x, 5, False, True) == OTHER
    assert choose(x, 5, False, False) == ONE
    assert choose(x, 5, True, False) == heuristic(torch.float16, 3, 5, 8, True)
    assert choose(x.float(), 5, False, True) == heuristic(torch.float32, 3, 5, 8, False)


@interpreted
def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = noise(2, 16, dtype=torch.float16), noise(5, 16, dtype=torch.float16)
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(timing, "microseconds", lambda *_: next(times))
    configs = [ONE, OTHER, GemmConfig("fma", 4, 64, 2)]
    best, found = tune(x, weight, configs=configs, norm=Norm(torch.ones(16).half()), norm_kind="rmsnorm")
    assert best == OTHER
    assert found == dict(zip(configs, (3.0, 1.0, 2.0), strict=True))
    assert read_table(user_table("interpreter")) == {key(torch.float16, 2, 5, 16, False, True): OTHER}
    assert choose(x, 5, False, True) == OTHER


@interpreted
def test_tuning_measures_and_need_not_save() -> None:
    x, weight = noise(1, 16), noise(6, 16)
    best, found = tune(x, [weight, weight.clone()], configs=[ONE, GemmConfig("mma", 16, 32)], save=False, gated=True)
    assert best == ONE
    assert list(found) == [ONE]  # "mma" refuses fp32 and is passed over
    assert found[ONE] > 0
    assert not user_table("interpreter").exists()


@interpreted
def test_tuning_that_cannot_be() -> None:
    x, weight = noise(1, 16), noise(6, 16)
    with pytest.raises(KernelError, match="no config could run"):
        tune(x, weight, configs=[GemmConfig("mma", 16, 32)])
    with pytest.raises(KernelError, match="bias has shape"):
        tune(x, weight, bias=torch.zeros(7))


@interpreted
def test_tuning_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.gemm.timing.candidates", lambda *_: [ONE, OTHER])
    main(["--shapes", "16x5,8x3", "--m", "1,4", "--dtype", "fp32", "--norm", "layernorm", "--ship", str(tmp_path)])
    assert set(read_table(tmp_path / "interpreter.json")) == {
        f"fp32/m{m}/{shape}/norm" for m in (1, 4) for shape in ("5x16", "3x8")
    }
    assert not user_table("interpreter").exists()
    main(["--shapes", "16x5", "--m", "2", "--gated"])
    assert set(read_table(user_table("interpreter"))) == {"fp16/m2/5x16/gated"}


@interpreted
def test_nothing_is_tuned_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU not even when asked: the interpreter's times mean nothing."""
    monkeypatch.setenv("SLIPSTREAM_TUNE", "1")
    skinny_gemm(noise(1, 16), noise(3, 16))
    assert not user_table("interpreter").exists()


@pytest.mark.gpu
def test_tuning_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.gemm.timing.candidates", lambda *_: [ONE, GemmConfig("mma", 16, 32)])
    x, weight = noise(2, 64, device="cuda", dtype=torch.float16), noise(48, 64, device="cuda", dtype=torch.float16)
    skinny_gemm(x, weight)
    device = torch.cuda.get_device_name()
    assert not user_table(device).exists()
    monkeypatch.setenv("SLIPSTREAM_TUNE", "1")
    skinny_gemm(x, weight)
    assert set(read_table(user_table(device))) == {"fp16/m2/48x64/plain"}


def test_shipped_tables_can_be_read() -> None:
    for path in (Path(tuning.__file__).parent / "tuned").glob("*.json"):
        assert read_table(path)
        assert path.name == table_name(json.loads(path.read_text())["device"])


def test_buckets() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 8, 9, 33, 64)] == [1, 2, 4, 8, 16, 64, 64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_candidates(dtype: torch.dtype, gated: bool) -> None:
    for rows in BUCKETS:
        for columns, inner in ((768, 768), (2304, 768), (12288, 49152), (50257, 1600)):
            found = candidates(dtype, rows, columns, inner, gated)
            assert len(found) >= 3
            assert len(found) == len(set(found))
            assert dtype == torch.float16 or not any(config.kind == "mma" for config in found)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "wgmma"},
        {"block_n": 3},
        {"block_k": 4},
        {"block_k": 0},
        {"warps": 64},
        {"warps": 2.0},
        {"slices": 2},
        {"stages": 2},
        {"kind": "ring", "block_n": 8},
        {"kind": "mma", "block_n": 4},
        {"kind": "mma", "block_k": 16},
    ],
)
def test_configs_that_no_kernel_could_run(change: dict[str, object]) -> None:
    with pytest.raises(KernelError):
        GemmConfig(**{"kind": "fma", "block_n": 2, "block_k": 64, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "inner", "once"),
    [
        (GemmConfig("fma", 2, 64), 64, True),
        (GemmConfig("fma", 2, 64), 65, False),
        (GemmConfig("mma", 16, 64, 4), 256, True),
        (GemmConfig("mma", 16, 64, 4), 257, False),
        (GemmConfig("mma", 16, 32, 4), 97, True),
    ],
)
def test_whether_k_lies_in_one_tile(config: GemmConfig, inner: int, once: bool) -> None:
    assert config.once(inner) == once


@pytest.mark.parametrize(
    ("config", "tiles"),
    [
        (GemmConfig("fma", 2, 64), {1: 1, 2: 2, 3: 4, 64: 4}),
        (GemmConfig("mma", 16, 32), {1: 8, 8: 8, 9: 16, 64: 16}),
        (GemmConfig("ring", 16, 32), {1: 8, 9: 16, 33: 64}),
    ],
)
def test_rows_of_a_tile(config: GemmConfig, tiles: dict[int, int]) -> None:
    assert {rows: config.rows(rows) for rows in tiles} == tiles
