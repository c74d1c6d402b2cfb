"""Published peaks of NVIDIA GPUs, by the name that torch reports: dense, without structured sparsity.

Where a datasheet gives a figure with sparsity alone, half of it stands here. Products of fp16 and bf16 are those that
sum in fp32, as torch's do: GeForce cards take them at half the rate of sums in fp16, and their white papers give both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One GPU's datasheet."""

    #: 10^12 operations a second by precision; one that the GPU has no units for is not there.
    tera: dict[str, float]
    #: 10^9 bytes a second of its memory.
    bandwidth: float
    #: MHz at which the peak of fp32, and those of the tensor cores, hold.
    fp32_clock: int
    tensor_clock: int
    #: The document.
    source: str


H100 = "NVIDIA H100 Tensor Core GPU datasheet (2024; PCIe: 2022); clocks: H100 Tensor Core GPU Architecture white paper"
H200 = "NVIDIA H200 Tensor Core GPU datasheet (2024); clocks of the H100 of the same form"
GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet (2024); clocks of the H100 SXM"
B200 = "NVIDIA Blackwell datasheet (2025), HGX B200, per GPU; TF32: an eighth of the eight GPUs"
A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021)"
A30 = "NVIDIA A30 Tensor Core GPU datasheet (2021)"
A10 = "NVIDIA A10 Tensor Core GPU datasheet (2021)"
GA102 = "NVIDIA Ampere GA102 GPU Architecture white paper, V2"
L4 = "NVIDIA L4 Tensor Core GPU datasheet (2023)"
L40 = "NVIDIA L40 GPU datasheet (2022)"
L40S = "NVIDIA L40S GPU datasheet (2023)"
AD102 = "NVIDIA Ada GPU Architecture white paper, V2, appendix A"
ADA_PRO = "NVIDIA Ada Lovelace Professional GPU Architecture white paper"
GB202 = "NVIDIA RTX Blackwell GPU Architecture white paper, V1.1, appendix A"
V100 = "NVIDIA V100 Tensor Core GPU datasheet (2020)"
T4 = "NVIDIA T4 Tensor Core GPU datasheet (2019)"


def _peaks(
    fp32: float,
    fp16: float,
    tf32: float | None = None,
    bf16: float | None = None,
    int8: float | None = None,
    fp8: float | None = None,
) -> dict[str, float]:
    given = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16, "int8": int8, "fp8": fp8}
    return {name: value for name, value in given.items() if value is not None}


_HOPPER_SXM = _peaks(fp32=67, tf32=494.5, bf16=989.5, fp16=989.5, int8=1979, fp8=1979)
_HOPPER_NVL = _peaks(fp32=60, tf32=417.5, bf16=835.5, fp16=835.5, int8=1670.5, fp8=1670.5)
_HOPPER_PCIE = _peaks(fp32=51, tf32=378, bf16=756.5, fp16=756.5, int8=1513, fp8=1513)
_BLACKWELL = _peaks(fp32=75, tf32=1125, bf16=2250, fp16=2250, int8=4500, fp8=4500)
_GA100 = _peaks(fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624)
#: The datasheet halves 733 in two ways, 362.05 and 366: the latter is what clock and units give.
_L40S = _peaks(fp32=91.6, tf32=183, bf16=366, fp16=366, int8=733, fp8=733)
_RTX_6000_ADA = _peaks(fp32=91.1, tf32=182.1, bf16=364.2, fp16=364.2, int8=728.5, fp8=728.5)

#: Without the "NVIDIA " or "Tesla " that drivers of some years put before it. Parts of a GPU (MIG) have names of their
#: own and are not here.
PUBLISHED: dict[str, Published] = {
    "B200": Published(_BLACKWELL, 7700, 1965, 1855, B200),
    "GH200 480GB": Published(_HOPPER_SXM, 4000, 1980, 1830, GH200),
    "GH200 144G HBM3e": Published(_HOPPER_SXM, 4900, 1980, 1830, GH200),
    "H200": Published(_HOPPER_SXM, 4800, 1980, 1830, H200),
    "H200 NVL": Published(_HOPPER_NVL, 4800, 1785, 1545, H200),
    "H100 80GB HBM3": Published(_HOPPER_SXM, 3350, 1980, 1830, H100),
    "H100 NVL": Published(_HOPPER_NVL, 3900, 1785, 1545, H100),
    "H100 PCIe": Published(_HOPPER_PCIE, 2000, 1755, 1620, H100),
    "A100-SXM4-40GB": Published(_GA100, 1555, 1410, 1410, A100),
    "A100-PCIE-40GB": Published(_GA100, 1555, 1410, 1410, A100),
    "A100-SXM4-80GB": Published(_GA100, 2039, 1410, 1410, A100),
    "A100 80GB PCIe": Published(_GA100, 1935, 1410, 1410, A100),
    "A30": Published(_peaks(fp32=10.3, tf32=82, bf16=165, fp16=165, int8=330), 933, 1440, 1440, A30),
    "A10": Published(_peaks(fp32=31.2, tf32=62.5, bf16=125, fp16=125, int8=250), 600, 1695, 1695, A10),
    "A40": Published(_peaks(fp32=37.4, tf32=74.8, bf16=149.7, fp16=149.7, int8=299.3), 696, 1740, 1740, GA102),
    "RTX A6000": Published(_peaks(fp32=38.7, tf32=77.4, bf16=154.8, fp16=154.8, int8=309.7), 768, 1800, 1800, GA102),
    "GeForce RTX 3090": Published(_peaks(fp32=35.6, tf32=35.6, bf16=71, fp16=71, int8=284), 936, 1695, 1695, GA102),
    "L4": Published(_peaks(fp32=30.3, tf32=60, bf16=121, fp16=121, int8=242.5, fp8=242.5), 300, 2040, 2040, L4),
    "L40": Published(_peaks(fp32=90.5, tf32=90.5, bf16=181, fp16=181, int8=362, fp8=362), 864, 2490, 2490, L40),
    "L40S": Published(_L40S, 864, 2520, 2520, L40S),
    "RTX 6000 Ada Generation": Published(_RTX_6000_ADA, 960, 2505, 2505, ADA_PRO),
    "GeForce RTX 4090": Published(
        _peaks(fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, int8=660.6, fp8=330.3), 1008, 2520, 2520, AD102
    ),
    "GeForce RTX 5090": Published(
        _peaks(fp32=104.8, tf32=104.8, bf16=209.5, fp16=209.5, int8=838, fp8=419), 1792, 2407, 2407, GB202
    ),
    "V100-SXM2-16GB": Published(_peaks(fp32=15.7, fp16=125), 900, 1530, 1530, V100),
    "V100-SXM2-32GB": Published(_peaks(fp32=15.7, fp16=125), 900, 1530, 1530, V100),
    "V100-PCIE-16GB": Published(_peaks(fp32=14, fp16=112), 900, 1380, 1380, V100),
    "V100-PCIE-32GB": Published(_peaks(fp32=14, fp16=112), 900, 1380, 1380, V100),
    "V100S-PCIE-32GB": Published(_peaks(fp32=16.4, fp16=130), 1134, 1597, 1597, V100),
    "T4": Published(_peaks(fp32=8.1, fp16=65, int8=130), 320, 1590, 1590, T4),
}


def published(name: str) -> Published | None:
    """The datasheet of a GPU by the name that torch reports, None for one that is not known by exactly that name."""
    return PUBLISHED.get(name.removeprefix("NVIDIA ").removeprefix("Tesla "))
