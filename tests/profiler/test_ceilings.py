"""Ceilings: the table against units and clocks of white papers; NVML's answers; measuring, keeping; the roofline."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from profiler import ProfilerError, nvml, rates
from profiler.ceilings import Ceilings, ceilings, intensity, roofline
from profiler.device_table import PUBLISHED, published

CPU = torch.device("cpu")
#: Operations a clock of one multiprocessor, two a multiply-accumulate: what NVIDIA's white papers say of each
#: architecture (products of half precisions that sum in fp32).
VOLTA = {"fp32": 128, "fp16": 1024}
TURING = {"fp32": 128, "fp16": 1024, "int8": 2048}
GA100 = {"fp32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048, "int8": 4096}
GA10X = {"fp32": 256, "tf32": 512, "bf16": 1024, "fp16": 1024, "int8": 2048}
GEFORCE_30 = {"fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "int8": 2048}
ADA = {**GA10X, "fp8": 2048}
L40 = {"fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "int8": 1024, "fp8": 1024}
GEFORCE_40 = {**GEFORCE_30, "fp8": 1024}
HOPPER = {"fp32": 256, "tf32": 2048, "bf16": 4096, "fp16": 4096, "int8": 8192, "fp8": 8192}
BLACKWELL = {"fp32": 256, "tf32": 4096, "bf16": 8192, "fp16": 8192, "int8": 16384, "fp8": 16384}
#: Multiprocessors; units of each; the memory's bus in bits and its rate in Gbit/s a pin.
CHIPS = {
    "B200": (148, BLACKWELL, 8192, 7.5),
    "GH200 480GB": (132, HOPPER, 6144, 5.2),
    "GH200 144G HBM3e": (132, HOPPER, 6144, 6.4),
    "H200": (132, HOPPER, 6144, 6.25),
    "H200 NVL": (132, HOPPER, 6144, 6.25),
    "H100 80GB HBM3": (132, HOPPER, 5120, 5.24),
    "H100 NVL": (132, HOPPER, 6144, 5.1),
    "H100 PCIe": (114, HOPPER, 5120, 3.19),
    "A100-SXM4-40GB": (108, GA100, 5120, 2.43),
    "A100-PCIE-40GB": (108, GA100, 5120, 2.43),
    "A100-SXM4-80GB": (108, GA100, 5120, 3.186),
    "A100 80GB PCIe": (108, GA100, 5120, 3.024),
    "A30": (56, GA100, 3072, 2.43),
    "A10": (72, GA10X, 384, 12.5),
    "A40": (84, GA10X, 384, 14.5),
    "RTX A6000": (84, GA10X, 384, 16),
    "GeForce RTX 3090": (82, GEFORCE_30, 384, 19.5),
    "L4": (58, ADA, 192, 12.5),
    "L40": (142, L40, 384, 18),
    "L40S": (142, ADA, 384, 18),
    "RTX 6000 Ada Generation": (142, ADA, 384, 20),
    "GeForce RTX 4090": (128, GEFORCE_40, 384, 21),
    "GeForce RTX 5090": (170, GEFORCE_40, 512, 28),
    "V100-SXM2-16GB": (80, VOLTA, 4096, 1.756),
    "V100-SXM2-32GB": (80, VOLTA, 4096, 1.756),
    "V100-PCIE-16GB": (80, VOLTA, 4096, 1.756),
    "V100-PCIE-32GB": (80, VOLTA, 4096, 1.756),
    "V100S-PCIE-32GB": (80, VOLTA, 4096, 2.214),
    "T4": (40, TURING, 256, 10),
}
H100 = PUBLISHED["H100 80GB HBM3"]


def test_every_gpu_of_the_table_is_checked() -> None:
    assert CHIPS.keys() == PUBLISHED.keys()
    assert all(entry.source for entry in PUBLISHED.values())


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_units_times_clock_and_bandwidth_bus_times_rate(name: str) -> None:
    entry = PUBLISHED[name]
    units, each, bits, gigabits = CHIPS[name]
    assert entry.tera.keys() == each.keys()
    for dtype, tera in entry.tera.items():
        clock = entry.fp32_clock if dtype == "fp32" else entry.tensor_clock
        # Datasheets round to two or three digits.
        assert tera == pytest.approx(units * each[dtype] * clock * 1e6 / 1e12, rel=0.015), dtype
    assert entry.bandwidth == pytest.approx(bits / 8 * gigabits, rel=0.025)


@pytest.mark.parametrize("name", CHIPS)
def test_rows_agree_with_themselves(name: str) -> None:
    tera = PUBLISHED[name].tera
    assert tera.get("bf16", tera["fp16"]) == tera["fp16"]
    if "tf32" in tera:
        assert tera["fp32"] <= tera["tf32"] <= tera["fp16"] * 0.505
    if "int8" in tera:
        assert tera["int8"] / tera["fp16"] == pytest.approx(4 if "GeForce" in name else 2, rel=0.01)
    if "fp8" in tera:
        assert tera["fp8"] == pytest.approx(2 * tera["fp16"], rel=0.01)


def test_names_are_those_of_all_drivers_and_no_guesses() -> None:
    assert published("NVIDIA A100-SXM4-80GB") is published("A100-SXM4-80GB") is PUBLISHED["A100-SXM4-80GB"]
    assert published("Tesla T4") is PUBLISHED["T4"]
    for other in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H20", "NVIDIA A10G", "AMD Instinct MI300X"):
        assert published(other) is None


class FakeNvml(SimpleNamespace):
    """As ``pynvml``, of one H100 SXM; what an answer lacks raises as NVML does."""

    class NVMLError(Exception):
        """NVML's own."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    nvmlClocksEventReasonGpuIdle = 0x1
    nvmlClocksEventReasonApplicationsClocksSetting = 0x2
    nvmlClocksEventReasonSwPowerCap = 0x4

    def __init__(self, **answers: int) -> None:
        super().__init__(open=0, asked="")
        self.answers = {"memory": 2619, "bits": 5120, "highest": 1980, "now": 1980, "reasons": 0, **answers}

    def nvmlInit(self) -> None:
        if "broken" in self.answers:
            raise self.NVMLError("no driver")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return uuid

    def answer(self, name: str) -> int:
        if self.answers.get(name) is None:
            raise self.NVMLError("not supported")
        return self.answers[name]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, kind: int) -> int:
        return self.answer("memory" if kind == self.NVML_CLOCK_MEM else "highest")

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return self.answer("now")

    def nvmlDeviceGetMemoryBusWidth(self, handle: str) -> int:
        return self.answer("bits")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.answer("reasons")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return self.answer("limit")

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: str) -> int:
        return self.answer("default")


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch):
    """``ceilings`` of an H100 whose NVML gives these answers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))

    def find(**answers: int | None) -> Ceilings:
        fake = FakeNvml(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        found = ceilings("cuda")
        assert fake.open == 0
        assert "broken" in answers or fake.asked == "GPU-12-34"
        return found

    return find


def test_nvml_gives_the_bandwidth_and_the_table_the_peaks(h100) -> None:
    found = h100()
    assert found.bandwidth == 2619e6 * 2 * 640  # 3.352e12; the datasheet says 3.35 TB/s
    assert found.bandwidth == pytest.approx(H100.bandwidth * 1e9, rel=0.005)
    assert found.flops == {dtype: tera * 1e12 for dtype, tera in H100.tera.items()}
    assert found.sources == {**dict.fromkeys(H100.tera, "table"), "bandwidth": "nvml"}
    assert (found.clock, found.document) == (None, H100.source)


@pytest.mark.parametrize("answers", [{"broken": 1}, {"memory": None}, {"bits": None}])
def test_where_nvml_does_not_tell_the_datasheet_stands(h100, answers) -> None:
    found = h100(**answers)
    assert found.bandwidth == 3350e9
    assert set(found.sources.values()) == {"table"}


def test_without_nvidia_ml_py_the_datasheet_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.told(torch.device("cuda")) == nvml.Told()


LOCKED = {"reasons": 0x2, "now": 915}
LOW_LIMIT = {"reasons": 0x4, "now": 915, "limit": 350_000, "default": 700_000}


@pytest.mark.parametrize("answers", [LOCKED, LOW_LIMIT, {"highest": 915}, {"highest": 915, "reasons": None}])
def test_a_clock_that_is_held_down_takes_the_peaks_down(h100, answers) -> None:
    found = h100(**answers)
    assert found.clock == 915
    assert found.flops["fp16"] == pytest.approx(989.5e12 / 2)  # of 1830 MHz
    assert found.flops["fp32"] == pytest.approx(67e12 * 915 / 1980)


def test_a_clock_between_that_of_tensor_cores_and_that_of_fp32(h100) -> None:
    found = h100(highest=1900)
    assert (found.clock, found.flops["bf16"]) == (1900, 989.5e12)
    assert found.flops["fp32"] == pytest.approx(67e12 * 1900 / 1980)


@pytest.mark.parametrize(
    "answers",
    [
        {"reasons": 0x1, "now": 345},  # idle
        {"reasons": 0x3, "now": 345},  # idle, and a setting too
        {"reasons": 0x40, "now": 1200},  # heat
        {**LOW_LIMIT, "limit": 700_000},  # the limit of power is the card's own
        {**LOW_LIMIT, "limit": None},
    ],
)
def test_what_passes_by_itself_is_no_ceiling(h100, answers) -> None:
    found = h100(**answers)
    assert (found.clock, found.flops["fp16"]) == (None, 989.5e12)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Tiny sizes, and a cache of one's own: gives its directory."""
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(rates.MATRIX, "cpu", 64)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    return tmp_path / "ceilings"


def test_a_cpu_is_measured_once_and_kept(small, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings("cpu")
    assert set(found.flops) == {"fp32", "bf16", "fp16", "int8"}
    assert set(found.sources.values()) == {"measured"}
    assert all(1e5 < rate < 1e14 for rate in [*found.flops.values(), found.bandwidth])
    [file] = small.iterdir()
    assert torch.__version__ in file.name
    monkeypatch.setattr(rates, "read_rate", lambda device: 7.0)
    assert ceilings("cpu") == found
    assert ceilings("cpu", measure=True).bandwidth == 7.0
    assert ceilings("cpu").bandwidth == 7.0
    assert list(small.iterdir()) == [file]


def test_other_threads_are_another_measurement(small, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    ceilings("cpu")
    assert len(list(small.iterdir())) == 2


DAMAGE = ["", "[]", "{}", "\xff", "flops", "nan", "source", "device", "more"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again_with_one_warning(small, damage: str, caplog) -> None:
    document = ceilings("cpu").to_dict()
    [file] = small.iterdir()
    changes = {
        "flops": {"flops": {}},
        "nan": {"bandwidth": math.nan},
        "source": {"sources": {**document["sources"], "fp32": "guessed"}},
        "device": {"device": "another"},
        "more": {"surplus": 1},
    }
    text = json.dumps({**document, **changes[damage]}) if damage in changes else damage
    file.write_text(text, "latin-1")
    with caplog.at_level(logging.WARNING):
        found = ceilings("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(file) in caplog.text
    caplog.clear()
    assert ceilings("cpu") == found
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_a_warning(small, caplog) -> None:
    small.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert ceilings("cpu", measure=True).flops
    assert "cannot be kept" in caplog.text


def test_a_gpu_that_the_table_does_not_know_is_measured(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10G")
    monkeypatch.setattr(rates, "measurable", lambda device: ("fp16",))
    monkeypatch.setattr(rates, "product_rate", lambda device, dtype: 5.0)
    monkeypatch.setattr(rates, "read_rate", lambda device: 3.0)
    found = ceilings("cuda")
    assert (found.device, found.flops, found.bandwidth) == ("NVIDIA A10G", {"fp16": 5.0}, 3.0)
    assert set(found.sources.values()) == {"measured"}


def test_the_rate_is_two_operations_a_multiplication_over_the_fastest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.MATRIX, "cpu", 8)
    monkeypatch.setitem(rates.READ_BYTES, "cpu", 4096)
    times = iter([0.5, 0.25, 0.3, 2.0] * 9)
    monkeypatch.setattr(rates, "_seconds", lambda run, device: (run(), next(times))[1])
    assert rates.product_rate(CPU, "int8") == 2 * 8**3 / 0.25
    times = iter([0.5] * 40)
    assert rates.read_rate(CPU) == 4096 / 0.5


@pytest.mark.parametrize("before", ["highest", "high"])
def test_fp32_is_measured_as_fp32_and_the_setting_comes_back(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.MATRIX, "cpu", 8)
    seen = []
    monkeypatch.setattr(
        rates, "_seconds", lambda run, device: seen.append(torch.backends.mkldnn.matmul.fp32_precision) or 1.0
    )
    torch.set_float32_matmul_precision(before)
    try:
        set_before = torch.backends.mkldnn.matmul.fp32_precision
        rates.product_rate(CPU, "fp32")
        assert set(seen) == {"ieee"}
        assert torch.backends.mkldnn.matmul.fp32_precision == set_before
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


ONE = Ceilings("one", {"fp32": 100.0, "bf16": 400.0}, 10.0, {"fp32": "table", "bf16": "table", "bandwidth": "nvml"})


def test_the_roofline_is_the_longer_of_the_two_times() -> None:
    assert ONE.ridge("fp32") == 10.0
    assert roofline(ONE, 200, 5, torch.float32) == (2.0, "compute")
    assert roofline(ONE, 200, 30, "fp32") == (3.0, "memory")
    assert roofline(ONE, 200, 20, "fp32") == (2.0, "memory")  # on the ridge
    assert roofline(ONE, 200, 5, torch.bfloat16) == (0.5, "memory")
    assert roofline(ONE, 0, 0, "fp32") == (0.0, "memory")
    # A product of N x N matrices has intensity 2 N^3 / (3 N^2 x element) = N / 6 in fp32.
    assert intensity(2 * 96**3, 3 * 96**2 * 4) == 16
    assert (intensity(1, 0), intensity(0, 0)) == (math.inf, 0)


def test_a_dtype_without_a_ceiling_and_a_device_without_one() -> None:
    with pytest.raises(ProfilerError, match="one has no ceiling for fp8; there are fp32, bf16"):
        roofline(ONE, 1, 1, torch.float8_e5m2)
    with pytest.raises(ProfilerError, match=r"torch\.float64"):
        ONE.peak(torch.float64)
    with pytest.raises(ProfilerError, match="meta: ceilings are known of"):
        ceilings("meta")
    with pytest.raises(ProfilerError, match="fp8 cannot be measured; there are fp32"):
        rates.product_rate(CPU, "fp8")


def test_json_both_ways() -> None:
    held = replace(ONE, clock=915, document="a datasheet")
    assert Ceilings.from_dict(json.loads(json.dumps(held.to_dict()))) == held


@pytest.mark.gpu
def test_this_gpu_reaches_its_table_and_does_not_pass_it(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    device = torch.device("cuda")
    if published(torch.cuda.get_device_name(device)) is None:
        pytest.skip(f"{torch.cuda.get_device_name(device)} is not in the table")
    table, measured = ceilings(device), ceilings(device, measure=True)
    assert table.bandwidth == pytest.approx(PUBLISHED[table.device.removeprefix("NVIDIA ")].bandwidth * 1e9, rel=0.05)
    assert 0.4 < measured.bandwidth / table.bandwidth < 1.05
    assert table.flops.keys() <= measured.flops.keys()
    for dtype, peak in table.flops.items():
        assert 0.4 < measured.flops[dtype] / peak < 1.05, dtype
