"""Checkpoints that someone made to do harm: nothing in them is unpickled, and what lies outside of them is not read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.training.checkpoint import Checkpoints
from engine.training.checkpoint_files import list_saved
from tests.engine.training.checkpoint_things import Box, python, refused, run, saved_box, sign, train


class Boom:
    """Unpickling this runs a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch $PLANTED",))


WATCHED = """
    import sys
    found = []
    from pathlib import Path
    from tests.engine.training.checkpoint_things import Box, Checkpoints, run
    things = {**run(), "box": Box()}
    def watch(event, arguments):
        if event == "pickle.find_class":
            found.append(arguments)
    sys.addaudithook(watch)
    print(Checkpoints(sys.argv[1]).restore(things))
    assert not found, found
    import pickle
    pickle.loads(next(Path(sys.argv[1]).glob("*/.metadata")).read_bytes())
    assert found, "the watch sees nothing"
"""


def test_restoring_unpickles_nothing(tmp_path: Path) -> None:
    directory, planted = tmp_path / "run", tmp_path / "planted"
    things = {**run(), "box": Box({"bytes": pickle.dumps(Boom()), "tensor": torch.zeros(100, dtype=torch.uint8)})}
    train(things, 1)
    path = Checkpoints(directory).save(1, things)
    evil = pickle.dumps(Boom())
    for name in (".metadata", "__0_0.distcp", "data.pkl", "state.pt"):
        (path / name).write_bytes(evil)
    body = bytearray((path / "tensors-00000.bin").read_bytes())
    body[: len(evil)] = evil
    (path / "tensors-00000.bin").write_bytes(body)
    sign(path)
    done = python(WATCHED, str(directory), env={**os.environ, "PLANTED": str(planted)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
    assert planted.exists(), "the program that was planted is one"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"start":0', '"start":4000'),
        ('"start":0', '"start":-64'),
        ('"offsets":[0]', '"offsets":[1]'),
        ('"shape":[1000],"file"', '"shape":[999],"file"'),
        ("tensors-00000.bin", "../../secret.bin"),
        ('"float32"', '"save"'),
        ('"dtype"', '"kind"'),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, old: str, new: str) -> None:
    checkpoints = saved_box(tmp_path, 1)
    index = list_saved(tmp_path)[0].path / "tensors.json"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, new))
    sign(index.parent)
    refused(lambda: checkpoints.restore({"box": Box()}), str(index.parent), "not as slipstream writes it")


@pytest.mark.parametrize(("old", "new"), [("$tensor", "$code"), ("box/state/tensor", "nobody"), ('"state":', '"no":')])
def test_a_state_that_lies_is_refused(tmp_path: Path, old: str, new: str) -> None:
    checkpoints = saved_box(tmp_path, 1)
    state = list_saved(tmp_path)[0].path / "state.json"
    state.write_text(state.read_text().replace(old, new))
    sign(state.parent)
    refused(lambda: checkpoints.restore({"box": Box()}), str(state.parent), "not as slipstream writes it")
