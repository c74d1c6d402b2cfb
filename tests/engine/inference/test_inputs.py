"""What a user may hand over as a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.inference.inputs import flat_from, rows_from
from engine.inference.text import Text


class Words:
    """A tokenizer of whole words."""

    def __call__(self, texts: list[Any]) -> dict[str, Any]:
        rows = [(" ".join(t) if isinstance(t, tuple) else t) for t in texts]
        return {"input_ids": [[len(word) for word in row.split()] for row in rows]}


TEXT = Text(None, tokenizer=Words())
GOOD: list[tuple[Any, list[list[int]], bool]] = [
    ("a bb", [[1, 2]], True),
    (["a", "bb ccc"], [[1], [2, 3]], False),
    ([("a", "bb"), ("ccc", "d")], [[1, 2], [3, 1]], False),
    ([5, 6, 7], [[5, 6, 7]], True),
    ([[5], [6, 7]], [[5], [6, 7]], False),
    (torch.tensor([5, 6]), [[5, 6]], True),
    (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]], False),
    ({"input_ids": [[5, 0], [6, 7]], "attention_mask": [[1, 0], [1, 1]]}, [[5], [6, 7]], False),
]


@pytest.mark.parametrize(("batch", "ids", "single"), GOOD, ids=lambda value: str(value)[:30])
def test_rows(batch: Any, ids: list[list[int]], single: bool) -> None:
    rows = rows_from(batch, TEXT)
    assert (rows.ids, rows.single) == (ids, single)


BAD: list[tuple[Any, str]] = [
    ([], "the batch is empty"),
    ({"ids": [1]}, "a batch needs input_ids, got ids"),
    (3, "got int"),
    ([1, "a"], "all of one kind"),
    ([True, False], "all of one kind"),
    (torch.zeros(2, 2), "wanted integers"),
    (torch.zeros(2, 2, 2, dtype=torch.long), "wanted integers"),
    ({"input_ids": [[5, 6]], "attention_mask": [[1, 1, 1]]}, r"attention_mask: shape \[1, 3\] does not fit"),
    ({"input_ids": [[5, 6]], "token_type_ids": [[1]]}, r"token_type_ids: shape \[1, 1\] does not fit"),
]


@pytest.mark.parametrize(("batch", "message"), BAD, ids=lambda value: str(value)[:30])
def test_what_is_no_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        rows_from(batch, TEXT)


def test_outputs_go_back_where_the_padding_was() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    rows = rows_from({"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask}, TEXT)
    flat = torch.arange(1.0, 5.0)[:, None]
    assert rows.pad(flat)[..., 0].tolist() == [[0, 0, 1], [2, 3, 4]]
    assert rows_from([[1], [2, 3]], TEXT).pad(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 0], [2, 3]]


def test_token_types_follow_the_mask() -> None:
    batch = {"input_ids": [[7, 8, 0]], "attention_mask": [[1, 1, 0]], "token_type_ids": [[0, 1, 0]]}
    assert rows_from(batch, TEXT).types == [[0, 1]]


# ---- ids that stay on their device ----

CPU = torch.device("cpu")
MASKS: dict[str, Any] = {
    "none": None,
    "whole": [[1, 1, 1], [1, 1, 1]],
    "right": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    "left": torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    "holes": torch.tensor([[True, False, True], [False, True, False]]),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_tensor_gives_the_same_rows_without_lists(mask: str, mapped: bool, dtype: torch.dtype) -> None:
    ids, types = torch.tensor([[3, 4, 5], [6, 7, 8]], dtype=dtype), torch.tensor([[0, 1, 0], [1, 0, 1]])
    beside = {"attention_mask": MASKS[mask], "token_type_ids": types}
    batch, given = ({"input_ids": ids, **beside}, {}) if mapped else (ids, beside)
    flat, rows = flat_from(batch, CPU, **given), rows_from(batch, TEXT, **given)
    assert flat is not None
    assert flat.types is not None
    assert (flat.ids.dtype, flat.types.dtype) == (torch.int64, torch.int64)
    assert flat.ids.tolist() == [t for row in rows.ids for t in row]
    assert flat.types.tolist() == [t for row in rows.types or [] for t in row]
    assert flat.lengths == tuple(map(len, rows.ids))
    assert (flat.rows().ids, flat.rows().types) == (rows.ids, rows.types)
    hidden = torch.arange(1.0, flat.ids.numel() * 2 + 1).view(-1, 2)
    assert torch.equal(flat.pad(hidden), rows.pad(hidden))
    assert torch.equal(flat.pad(hidden[:, 0]), rows.pad(hidden[:, 0]))


def test_one_sequence_of_ids_needs_no_second_dimension() -> None:
    flat = flat_from(torch.tensor([5, 6]), CPU)
    assert flat is not None
    assert (flat.lengths, flat.shape, flat.types) == ((2,), (1, 2), None)


EMPTY, ELSEWHERE = torch.zeros(0, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long, device="meta")


@pytest.mark.parametrize("batch", ["a bb", [[1, 2]], {"input_ids": [[1]]}, {"ids": 3}, EMPTY, ELSEWHERE], ids=str)
def test_whatever_else_is_left_to_the_rows(batch: Any) -> None:
    assert flat_from(batch, CPU) is None


@pytest.mark.parametrize(("batch", "message"), [bad for bad in BAD if isinstance(bad[0], torch.Tensor | dict)],
                         ids=lambda value: str(value)[:30])  # fmt: skip
def test_a_tensor_that_is_no_batch_is_refused_alike(batch: Any, message: str) -> None:
    if isinstance(batch, dict) and "input_ids" in batch:
        batch = {**batch, "input_ids": torch.tensor(batch["input_ids"])}
    read = rows_from if isinstance(batch, dict) and "input_ids" not in batch else flat_from
    with pytest.raises(EngineError, match=message):
        read(batch, TEXT if read is rows_from else CPU)  # type: ignore[operator]
