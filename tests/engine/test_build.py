"""The connector: each "auto" is resolved with a reason, each explicit choice kept or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from config_schema import Config, load_config
from engine import build
from engine.errors import EngineError
from ops.errors import KernelError
from tests.engine.tiny import tiny


def plan(model_type: str = "gpt2", **document: Any) -> build.Plan:
    task = "causal_lm" if model_type in ("gpt2", "llama") else "embedding"
    path = str(tiny(model_type, task).directory)
    return build.plan(load_config({"model": {"path": path}, "device": "cpu", **document}))


def choice(found: build.Plan, path: str) -> build.Choice:
    return next(choice for choice in found.choices if choice.path == path)


def test_explicit_choices_are_kept_and_not_explained() -> None:
    found = plan(precision="bf16", kernels="eager", inference={"max_tokens": 50, "max_batch": 3, "prefill_chunk": 9})
    assert (found.dtype, found.kernels) == (torch.bfloat16, "eager")
    assert (found.max_tokens, found.max_batch, found.prefill_chunk) == (50, 3, 9)
    assert {c.path for c in found.choices} == {"$.model.task"}


def test_every_auto_has_a_reason() -> None:
    found = plan("bert")
    assert all(c.reason for c in found.choices)
    assert {c.path for c in found.choices} >= {
        "$.precision",
        "$.kernels",
        "$.embedding.pooling",
        "$.embedding.normalize",
    }
    document = found.explain()
    assert document["precision"] == "fp32"
    assert document["embedding"]["pooling"] == "mean"
    assert load_config({**document}).to_dict() == document, "a resolved config is a config"


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        EngineError, match=r'\$\.device: "cuda:0", but no CUDA GPU is visible .*set "device" to "cpu" or "auto"'
    ):
        plan(device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineError, match="the GPUs here are cuda:0 to cuda:1"):
        plan(device="cuda:5")


def test_more_tokens_than_positions() -> None:
    with pytest.raises(EngineError, match=r"\$\.inference\.max_tokens: 500, but this model's positions end at 128"):
        plan(inference={"max_tokens": 500})


def test_the_cache_takes_no_more_than_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    per_token = 2 * 3 * 48 * 4  # keys and values, 3 layers, 48 elements of fp32
    monkeypatch.setattr(build, "_free_bytes", lambda device: 2 * 16 * per_token * 40)
    found = plan()
    assert found.max_tokens == 40
    assert "50% of the free memory" in choice(found, "$.inference.max_tokens").reason
    monkeypatch.setattr(build, "_free_bytes", lambda device: per_token)
    with pytest.raises(EngineError, match=r"lower inference\.max_batch"):
        plan()


def test_precision_on_a_gpu_follows_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config({"model": {"path": "x"}})
    gpu = torch.device("cuda")
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def chosen(stored: torch.dtype) -> str:
        return build._precision(config, gpu, stored, build.Resolver())

    assert [chosen(d) for d in (torch.float16, torch.bfloat16, torch.float32)] == ["fp16", "bf16", "bf16"]
    capability = (7, 5)
    assert chosen(torch.float32) == "fp16"


def test_a_kernel_set_that_refuses_is_passed_over_only_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.KERNEL_SETS, "picky", (__name__, "Picky"))  # type: ignore[attr-defined]
    found = plan()
    assert found.kernels == "eager"
    assert "picky: it never runs" in choice(found, "$.kernels").reason
    object.__setattr__(found.config, "kernels", "picky")
    with pytest.raises(KernelError, match="it never runs"):
        build.plan(found.config)


def test_auto_on_a_cpu_means_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton kernels are interpreted, as in tests, an explicit choice gets them and "auto" does not."""
    monkeypatch.setattr("ops.triton_support.interpreted", lambda: True)
    found = plan()
    assert found.kernels == "eager"
    assert "generic: it needs a CUDA GPU, the device is cpu" in choice(found, "$.kernels").reason
    assert plan(kernels="generic").kernels == "generic"
    monkeypatch.setattr("ops.triton_support.interpreted", lambda: False)
    with pytest.raises(
        KernelError, match='kernels "generic" need a CUDA GPU, the device is cpu: set "kernels" to "eager"'
    ):
        plan(kernels="generic")


def test_every_set_has_a_name_in_the_config() -> None:
    assert {"auto", *build.KERNEL_SETS} <= set(get_args(Config.model_fields["kernels"].annotation))
    assert build.GPU_SETS.isdisjoint({"eager"})


@pytest.mark.parametrize(("missing", "error"), [("triton.language", KernelError), ("yaml", ModuleNotFoundError)])
def test_a_set_whose_package_is_missing(
    missing: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking_set.py").write_text(f"raise ModuleNotFoundError(name={missing!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(build.KERNEL_SETS, "lacking", ("lacking_set", "Kernels"))  # type: ignore[attr-defined]
    with pytest.raises(error) as raised:
        build.kernel_set("lacking")
    if error is KernelError:
        assert str(raised.value).startswith(
            'kernels "lacking" need triton, which is not installed: pip install triton, or'
        )


class Picky:
    name = "picky"

    def assert_supports(self, *_: Any) -> None:
        raise KernelError("it never runs")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("mean", True)),
        ({"1_Pooling/config.json": '{"pooling_mode_cls_token": true}'}, ("cls", True)),
        ({"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}', "modules.json": "[]"}, ("mean", False)),
    ],
)
def test_pooling_follows_the_checkpoint(tmp_path: Path, files: dict[str, str], expected: tuple[str, bool]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert build.pooling_of(tmp_path)[:2] == expected


def test_a_pooling_that_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(EngineError, match=r'set embedding\.pooling to "mean" or "cls"'):
        build.pooling_of(tmp_path)
