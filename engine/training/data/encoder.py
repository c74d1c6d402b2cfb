"""What the tasks ask of a Hugging Face tokenizer, and the facts of it that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import EngineError


class Encoder:
    """Texts to ids with ``tokenizer``, a ``PreTrainedTokenizerBase``.

    Fast tokenizers split a list of texts among threads of their own (``TOKENIZERS_PARALLELISM``) and keep its order;
    Python threads around them would only make them fail ("Already borrowed").

    prefix, suffix: the special tokens that the tokenizer puts around a text.
    types:          whether its models take token types.
    pad:            what padding is filled with: its padding token, else its end-of-text token, which the attention mask
                    hides all the same. A model that looks for padding in the ids (GPT-2's classifier) must be told.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.types = "token_type_ids" in tokenizer.model_input_names
        self.vocabulary = len(tokenizer)
        self.special = tuple(tokenizer.all_special_ids)
        self.prefix, self.suffix = self._around()
        given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad: int = next((token for token in given if token is not None), 0)
        self.pad_type: int = getattr(tokenizer, "pad_token_type_id", 0) or 0

    def _around(self) -> tuple[list[int], list[int]]:
        """Found by looking at a text with and without them: this holds for every kind of tokenizer."""
        inner, whole = self.bare(["a"])[0], self.whole(["a"])["input_ids"][0]
        for at in range(len(whole) - len(inner) + 1):
            if whole[at : at + len(inner)] == inner:
                return whole[:at], whole[at + len(inner) :]
        raise EngineError("the tokenizer changes a text when it adds special tokens: it cannot be used for training")

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without special tokens."""
        ids: list[list[int]] = self._call(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def whole(self, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any) -> Any:
        """Texts, or pairs of texts, with special tokens and, where the tokenizer knows them, token types."""
        given = (list(texts),) if pairs is None else (list(texts), list(pairs))
        return self._call(*given, return_token_type_ids=self.types, **options)

    def _call(self, *texts: list[str], **options: Any) -> Any:
        # Not verbose: it would warn of each text that is longer than a model, which tasks cut or divide themselves.
        return self.tokenizer(*texts, return_attention_mask=False, verbose=False, **options)

    def separator(self, wanted: str | None, *defaults: int | None) -> int:
        """The id of the token ``wanted``; where it is None, the first of ``defaults`` that the tokenizer has."""
        if wanted is not None:
            found = self.tokenizer.get_vocab().get(wanted)
            if found is None:
                raise EngineError(f"separator: the tokenizer has no token {wanted!r}")
            return int(found)
        for token in defaults:
            if token is not None:
                return token
        raise EngineError("the tokenizer has no token that ends a text: name one of its tokens as separator")
