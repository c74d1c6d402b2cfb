"""What a user may hand over as a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.inference.inputs import rows_from
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
