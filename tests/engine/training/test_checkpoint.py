"""Checkpoints: exact, whole or not there, read without pickle, and refused in one line where they do not fit."""

from __future__ import annotations

import errno
import json
import logging
import random
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training import checkpoint_files
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.checkpoint_files import list_saved
from tests.conftest import ROOT
from tests.engine.training import checkpoint_ranks
from tests.engine.training.checkpoint_things import (
    Box,
    names,
    python,
    refused,
    restored_box,
    run,
    saved_box,
    sign,
    told,
    train,
)

# Exactness


def test_a_restored_run_goes_on_exactly(tmp_path: Path) -> None:
    things = run()
    train(things, 3)
    Checkpoints(tmp_path).save(3, things)
    expected = train(things, 4)
    assert len({*expected}) == 4
    others = run()
    train(others, 1)  # an optimizer that has state, and one that has none
    for resumed in (run(), others):
        assert Checkpoints(tmp_path).restore(resumed) == 3
        assert train(resumed, 4) == expected


def test_saving_changes_nothing(tmp_path: Path) -> None:
    things = run()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    state = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]
    Checkpoints(tmp_path).save(1, things)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert [random.getstate(), np.random.get_state()[1].tolist()] == state[1:]  # type: ignore[index]


def test_killed_runs_are_bit_identical() -> None:
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--steps", "24", "--kills"]
    done = subprocess.run([*command, "50"], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill_resume: 50 kills" in done.stdout
    assert "all bit-identical" in done.stdout
    broken = subprocess.run(
        [*command, "4", "--without", "random"], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert broken.returncode == 1, "without the random state it must not be so"
    assert "DIFFER" in broken.stdout


def test_state_of_every_kind(tmp_path: Path) -> None:
    alone, square = torch.randn(3, 4), torch.randn(2, 2)
    state = {
        "plain": [None, True, 0, -(2**70), 0.1, 1e-320, "a ü \u2028", [], {}, ()],
        "kinds": (float("inf"), (b"\x00\xff", [(1,)]), np.float64(0.1), np.int64(3)),
        "keys": {0: "a", "0": "b", None: "c", (1, "x"): "d", 0.5: "e", "$tuple": [1]},
        "ordered": OrderedDict([("b", 1), ("a", Counter({4: 2}))]),
        "tensors": {0: alone.t(), "0": alone[:, 1], "a/b": torch.tensor(True), "a": {"b": torch.empty(0, 3)}},
        "dtypes": [torch.ones(3).to(t) for t in (torch.bfloat16, torch.float16, torch.int8, torch.complex128)],
        "views": [square, square.t(), square[:1]],
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    Checkpoints(tmp_path).save(0, {"box": Box(state), "nan": Box(float("nan"))})
    box, nan = Box(), Box()
    Checkpoints(tmp_path).restore({"box": box, "nan": nan})
    assert nan.state != nan.state
    assert_same(box.state, state)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found.float(), expected.float()) if not expected.is_complex() else found.equal(expected)
    elif isinstance(expected, np.generic):
        assert found == expected
    else:
        assert type(found) is type(expected)
        if isinstance(expected, dict):
            assert list(found) == list(expected)
            for key in expected:
                assert_same(found[key], expected[key])
        elif isinstance(expected, list | tuple):
            assert len(found) == len(expected)
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
        else:
            assert found == expected


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    def save(value: Any) -> Callable[[], object]:
        return lambda: Checkpoints(tmp_path).save(1, {"box": Box({"a": [value]})})

    refused(save({1}), "box/state/a/0", "builtins.set", kind=EngineError)
    refused(save(torch.eye(3).to_sparse()), "box/state/a/0", "sparse", kind=EngineError)
    refused(save(torch.empty(3, device="meta")), "box/state/a/0", "meta", kind=EngineError)
    assert names(tmp_path) == []


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
        model["b"].weight = model["a"].weight
        return model

    model, again, apart = tied(), tied(), nn.ModuleDict({k: nn.Linear(64, 64, bias=False) for k in "ab"})
    path = Checkpoints(tmp_path).save(1, {"model": model})
    assert (path / "tensors-00000.bin").stat().st_size == 64 * 64 * 4
    for other in (again, apart):
        Checkpoints(tmp_path).restore({"model": other})
        assert all(torch.equal(other[key].weight, model["a"].weight) for key in "ab")


def test_an_optimizer_without_some_of_its_state(tmp_path: Path) -> None:
    """A layer that was always dropped has none."""
    things = run()
    things["model"][3].requires_grad_(False)
    train(things, 2)
    Checkpoints(tmp_path).save(2, things)
    resumed = run()
    train(resumed, 1)
    Checkpoints(tmp_path).restore(resumed)
    assert set(resumed["optimizer"].state_dict()["state"]) == {0, 1, 2, 3}


class Versioned(nn.Linear):
    """Notes which version of itself wrote the tensors that it loads."""

    _version = 5
    loaded: Any = None

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.loaded = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_learn_which_version_was_saved(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, {"model": nn.Sequential(Versioned(2, 2))})
    later = Versioned(2, 2)
    later._version = 6
    Checkpoints(tmp_path).restore({"model": nn.Sequential(later)})
    assert later.loaded == 5


def test_what_an_object_has_does_not_shape_what_it_gets(tmp_path: Path) -> None:
    expected = {"a": torch.tensor([0.5, 1.5]), "b": torch.arange(3), "c": torch.ones(2)}
    Checkpoints(tmp_path).save(1, {"box": Box(expected)})
    box = Box({"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(7), "d": torch.zeros(1)})
    Checkpoints(tmp_path).restore({"box": box})
    assert_same(box.state, expected)


# Whole or not there


def cut(path: Path) -> None:
    with (path / "tensors-00000.bin").open("r+b") as file:
        file.truncate(100)


def flip(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return change


def gone(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def empty(path: Path) -> None:
    (path / "manifest.json").write_text("")


def renamed(path: Path) -> None:
    path.rename(path.with_name("save-000009-step-00000099"))


def shorten(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


def elsewhere(path: Path) -> None:
    (path.parent / "secret").write_text("s")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret"] = {}
    (path / "manifest.json").write_text(json.dumps(manifest))
    sign(path)


DAMAGE = {
    "shorter manifest": (shorten, "checksum of manifest.json"),
    "files elsewhere": (elsewhere, "files elsewhere"),
    "cut": (cut, "100 bytes instead of 4,000"),
    "tensor bit": (flip("tensors-00000.bin"), "checksum of tensors-00000.bin"),
    "state bit": (flip("state.json"), "checksum of state.json"),
    "manifest bit": (flip("manifest.json"), "manifest.json"),
    "no manifest": (gone("manifest.json"), "no manifest.json"),
    "no tensors": (gone("tensors-00000.bin"), "tensors-00000.bin: No such file"),
    "empty manifest": (empty, "no JSON"),
    "renamed": (renamed, "is of step 3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    checkpoints = saved_box(tmp_path, 1, 2, 3)
    spoil, reason = DAMAGE[kind]
    spoil(list_saved(tmp_path)[-1].path)
    assert checkpoints.latest() == 2
    (message,) = told(caplog)
    assert reason in message
    assert "\n" not in message
    assert restored_box(checkpoints) == 2
    assert restored_box(checkpoints, 1) == 1
    assert restored_box(saved_box(tmp_path, 4)) == 4


def test_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = saved_box(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoints.steps() == (3, 4)
    gone("manifest.json")(list_saved(tmp_path)[-1].path)
    saved_box(tmp_path, 5, keep=2)
    assert checkpoints.steps() == (3, 5), "the damaged one does not count"
    saved_box(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["save-000006-step-00000006"]
    refused(lambda: Checkpoints(tmp_path, keep=0), "keep is 0", kind=EngineError)


def test_going_back_and_the_same_step_again(tmp_path: Path) -> None:
    checkpoints = saved_box(tmp_path, 10, 20)
    assert restored_box(checkpoints, 10) == 10
    saved_box(tmp_path, 12)
    assert checkpoints.latest() == 12, "the last one in time"
    saved_box(tmp_path, 12)
    assert checkpoints.steps() == (20, 12, 12)
    assert restored_box(checkpoints) == 12
    refused(lambda: checkpoints.restore({"box": Box()}, 11), "no whole checkpoint of step 11", "20, 12, 12")


def test_leftovers_go_with_the_next_save(tmp_path: Path) -> None:
    checkpoints = saved_box(tmp_path, 1)
    for left in (".saving-save-000002-step-00000002", ".removing-save-000000-step-00000000"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "tensors-00000.bin").write_text("half")
    (tmp_path / "notes").mkdir()
    assert checkpoints.latest() == 1
    saved_box(tmp_path, 2)
    assert names(tmp_path) == ["notes", "save-000001-step-00000001", "save-000002-step-00000002"]


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Raises the last error of the list instead of writing, once as many writes went well as there are others."""
    errors: list[BaseException] = []
    write = checkpoint_files.NewFile.write

    def refuse(self: checkpoint_files.NewFile, data: bytes | memoryview) -> None:
        if len(errors) == 1:
            raise errors[0]
        if errors:
            del errors[0]
        write(self, data)

    monkeypatch.setattr(checkpoint_files.NewFile, "write", refuse)
    return errors


@pytest.mark.parametrize("writes", range(5))
def test_a_full_disk(tmp_path: Path, broken_disk: list[BaseException], writes: int) -> None:
    """At each write: padding, tensor, index, state, manifest."""
    checkpoints = saved_box(tmp_path, 1, keep=1)
    broken_disk += [OSError()] * writes + [OSError(errno.ENOSPC, "No space left on device")]
    full = ("step 2 cannot be written", "No space left on device", "the checkpoint of step 1 is still there")
    refused(lambda: saved_box(tmp_path, 2, keep=1), str(tmp_path), *full, kind=EngineError)
    broken_disk.clear()
    assert names(tmp_path) == ["save-000001-step-00000001"]
    assert restored_box(checkpoints) == 1
    assert restored_box(saved_box(tmp_path, 2, keep=1)) == 2


def test_an_interrupt_leaves_nothing(tmp_path: Path, broken_disk: list[BaseException]) -> None:
    saved_box(tmp_path, 1)
    broken_disk.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        saved_box(tmp_path, 2)
    assert names(tmp_path) == ["save-000001-step-00000001"]


def test_the_kernel_refuses_a_write(tmp_path: Path) -> None:
    saved_box(tmp_path, 1)
    code = """
        import resource, sys, torch
        from tests.engine.training.checkpoint_things import Box, Checkpoints
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        Checkpoints(sys.argv[1]).save(2, {"box": Box(torch.zeros(1_000_000))})
    """
    done = python(code, str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("engine.errors.EngineError: ")
    assert "File too large" in last
    assert names(tmp_path) == ["save-000001-step-00000001"]


# What does not fit


def changed(things: dict[str, Any], name: str, item: Any) -> dict[str, Any]:
    return {**things, name: item}


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    things = run()
    train(things, 1)
    checkpoints = Checkpoints(tmp_path)
    path = str(checkpoints.save(1, things))
    wide, more = run(width=6), run(extra=True)
    before = [tensor.clone() for tensor in wide["model"].state_dict().values()]
    refused(
        lambda: checkpoints.restore(wide), path, "model", "0.weight has the shape [4, 3]", "[6, 3] in the model here"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, wide["model"].state_dict().values(), strict=True))
    refused(lambda: checkpoints.restore(more), path, "the model here has the tensor 4.weight, the checkpoint has not")
    less = nn.Sequential(*list(things["model"])[:3])
    refused(
        lambda: checkpoints.restore({"model": less}), path, "the checkpoint has the tensor 3.weight, the model here"
    )
    model = run()["model"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(lambda: checkpoints.restore({"optimizer": sgd}), "optimizer is of class AdamW", "SGD here")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 3)
    refused(lambda: checkpoints.restore({"schedule": cosine}), "schedule is of class MultiStepLR", "CosineAnnealingLR")
    refused(lambda: checkpoints.restore({"optimizer": wide["optimizer"]}), "parameter 0 has the shape [4, 3]", "[6, 3]")
    refused(lambda: checkpoints.restore({"optimizer": more["optimizer"]}), "6 parameters", "8 here")
    refused(lambda: checkpoints.restore(changed(run(), "scaler", Box())), path, "has no scaler")


def test_another_dtype_is_converted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoints(tmp_path).save(1, {"model": nn.Linear(2, 2)})
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    Checkpoints(tmp_path).restore({"model": model})
    assert model.weight.dtype == torch.bfloat16
    (message,) = told(caplog)
    assert "weight is torch.float32 in the checkpoint and torch.bfloat16 here (2 tensors in all)" in message


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoints = saved_box(tmp_path, 1, 2)
    (list_saved(tmp_path)[-1].path / "manifest.json").write_text('{"format": 7, "shape": "another"}')
    refused(checkpoints.latest, "is in format 7", "up to format 1")
    refused(lambda: checkpoints.restore({"box": Box()}), "is in format 7", "up to format 1")
    assert restored_box(checkpoints, 1) == 1


def test_wrong_directories(tmp_path: Path) -> None:
    box: dict[str, Stateful] = {"box": Box()}
    nowhere, file, void = tmp_path / "nowhere", tmp_path / "file", tmp_path / "void"
    file.write_text("")
    void.mkdir()
    assert Checkpoints(nowhere).latest() is None
    assert Checkpoints(void).steps() == ()
    refused(lambda: Checkpoints(nowhere).restore(box), str(nowhere), "no such directory")
    refused(lambda: Checkpoints(void).restore(box), str(void), "holds no checkpoint")
    refused(lambda: Checkpoints(void).restore(box, 3), str(void), "step 3", "none at all")
    refused(Checkpoints(file).latest, str(file), "Not a directory")
    refused(lambda: Checkpoints(file).restore(box), str(file), "Not a directory")
    refused(lambda: Checkpoints(file).save(1, box), str(file), "Not a directory", kind=Exception)
    saved_box(void, 1)
    inner = list_saved(void)[0].path
    refused(lambda: Checkpoints(inner).restore(box), str(inner), "is one checkpoint: name the directory")
    gone("manifest.json")(inner)
    refused(lambda: Checkpoints(void).restore(box), "holds 1 checkpoints, all damaged")


def test_no_permission(tmp_path: Path) -> None:
    saved_box(tmp_path / "run", 1)
    code = """
        import os, sys
        from tests.engine.training.checkpoint_things import Box, Checkpoints
        os.chdir(sys.argv[1])  # so that nobody needs to reach it from the root
        if os.geteuid() == 0:
            os.seteuid(65534)
        for call in (lambda c: c.save(2, {"box": Box(1)}), lambda c: c.restore({"box": Box()}), lambda c: c.latest()):
            try:
                call(Checkpoints("run"))
            except Exception as error:
                print(type(error).__name__, error)
    """
    for mode, lines in ((0o555, 1), (0o000, 3)):
        (tmp_path / "run").chmod(mode)
        tmp_path.chmod(0o755)
        done = python(code, str(tmp_path))
        (tmp_path / "run").chmod(0o755)
        found = done.stdout.splitlines()
        assert len(found) == lines, done.stdout + done.stderr
        assert all("Permission denied" in line and "Error" in line.split()[0] for line in found), found


# Several processes


def launch(size: int, root: Path) -> None:
    command = [sys.executable, "-m", checkpoint_ranks.__name__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=200)[0].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)


def test_other_numbers_of_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One process, then two, then three, then one again: replicated, and sharded by FSDP2."""
    things = checkpoint_ranks.objects(sharded=False)
    checkpoint_ranks.train(things, 0, 2)
    Checkpoints(tmp_path / "plain").save(2, things)
    checkpoint_ranks.train(things, 2, 2)
    expected = checkpoint_ranks.train(things, 4, 4)
    launch(2, tmp_path)
    launch(3, tmp_path)
    for name, step in (("replicated", 4), ("sharded-2", 4), ("sharded-3", 6)):
        resumed = checkpoint_ranks.objects(sharded=False)
        assert Checkpoints(tmp_path / name).restore(resumed) == step
        assert checkpoint_ranks.train(resumed, step, 8 - step) == pytest.approx(expected[step - 4 :], rel=1e-5)
    sizes = [file.stat().st_size for file in (tmp_path / "replicated").glob("*/tensors-*.bin")]
    assert len(sizes) == 2
    assert min(sizes) > 5000, "each rank wrote a part, and its own random state"
    state = json.loads(next((tmp_path / "replicated").glob("*/state.json")).read_text())
    assert state["ranks"] == len(state["per_rank"]) == 2


def test_progress_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slipstream.training")
    restored_box(saved_box(tmp_path, 7))
    first, second = told(caplog)
    size = r"\d+\.\d MB in \d+\.\d\d s"
    assert re.fullmatch(f"saved step 7: .*step-00000007, {size}", first)
    assert re.fullmatch(f"restored step 7: .*step-00000007, {size}", second)
