"""Text to token ids and back: a checkpoint's own tokenizer and chat template, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, EngineError

Message = Mapping[str, Any]


class Text:
    """A tokenizer, loaded when it is first asked for (``generate`` on token ids never needs one)."""

    def __init__(self, directory: Path | None, gguf_file: str | None = None, tokenizer: Any = None) -> None:
        self._directory, self._gguf_file, self._tokenizer = directory, gguf_file, tokenizer

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def saved_tokenizer(self) -> Any:
        """The tokenizer to save beside a model, None where there is none: token ids work without."""
        return None if self._directory is None and self._tokenizer is None else self.tokenizer

    def _load(self) -> Any:
        if self._directory is None:
            raise EngineError(
                "this engine was built from a live model without a tokenizer: give token ids, or tokenizer=..."
            )
        from transformers import AutoTokenizer

        extra = {"gguf_file": self._gguf_file} if self._gguf_file else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self._directory), trust_remote_code=False, **extra)
        except Exception as error:  # transformers raises many kinds; the directory is what the user can act on
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{self._directory}: no usable tokenizer here ({reason}); token ids still work"
            ) from error
        # Newer transformers make an empty tokenizer of a known class where its files are missing.
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise CheckpointError(
                f"{self._directory}: no tokenizer here (tokenizer.json): fetch it as well; token ids still work"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` with the tokenizer's special tokens."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation through the tokenizer's own template, up to where the assistant speaks."""
        for index, message in enumerate(messages):
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
                raise EngineError(f"messages[{index}]: wanted an object with role and content, got {message!r}")
        if not getattr(self.tokenizer, "chat_template", None):
            raise EngineError(
                f"{self._directory}: its tokenizer has no chat template: give a prompt instead of messages"
            )
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Detokenizer:
    """Text as tokens come: gives what is certain, holds back bytes of an unfinished character."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids: list[int] = []
        self._from = self._upto = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes, perhaps none yet."""
        self._ids.append(token)
        # Tokens are decoded behind a few known ones: a word's leading space shows only in context.
        before = self._text.decode(self._ids[self._from : self._upto])
        now = self._text.decode(self._ids[self._from :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._from, self._upto = self._upto, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is still held back."""
        before = self._text.decode(self._ids[self._from : self._upto])
        rest = self._text.decode(self._ids[self._from :])[len(before) :]
        self._from = self._upto = len(self._ids)
        return rest
