"""The training rows as a proxy model with a tokenizer of its own reads them.

Row i is row i of the raw dataset, tokenised when it is asked for, with the labels that TRL's `SFTTrainer` would give:

| columns | tokens | label tokens |
|---|---|---|
| `prompt`, `completion` (texts) | prompt, completion, end of sequence | those behind what prompt and whole share |
| `prompt`, `completion` (messages) | the chat template of both | those behind what prompt and whole share |
| `messages` | the chat template | all |
| `text` | text, end of sequence | all |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spice_trainer.data.assistant_turns import (
    AssistantTurnsError,
    common_prefix_length,
    find_training_template,
    mask_assistant_turns,
)
from spice_trainer.data.raw_rows import RawFormat, find_raw_format, list_raw_columns, malformed_row, read_raw_row
from spice_trainer.data.rows import fetch_rows

TruncationMode = Literal["keep_start", "keep_end"]


def collate_rows(rows: Sequence[Mapping[str, Sequence[int]]], *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Right-pads tokenised rows into a batch.

    Args:
        rows (`Sequence[Mapping[str, Sequence[int]]]`):
            N rows of `input_ids` and `labels`.
        pad_token_id (`int`, *optional*, defaults to `0`):
            What `input_ids` are padded with; nothing attends to it.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape `(N, S)`, labels padded with
        −100.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def pad(sequences: Iterable[Sequence[int]], value: int) -> Tensor:
        padded = [list(sequence) + [value] * (length - len(sequence)) for sequence in sequences]
        return torch.tensor(padded, dtype=torch.long)

    return {
        "input_ids": pad((row["input_ids"] for row in rows), pad_token_id),
        "attention_mask": pad(([1] * len(row["input_ids"]) for row in rows), 0),
        "labels": pad((row["labels"] for row in rows), -100),
    }


@dataclass(frozen=True, eq=False)
class TokenizedRows:
    """A dataset of raw rows, tokenised on demand by another tokenizer than the target's.

    Options mean what they mean in `SFTConfig`. Nothing is copied or kept, and no random state is touched. Row 0 is
    tokenised on creation, so that what doesn't fit shows there and not in the middle of a run.

    Args:
        dataset (`Any`):
            Raw rows: anything with a length whose items are dicts, such as `datasets.Dataset`. `tools` and
            `chat_template_kwargs` are handed to the chat template, other columns are ignored.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The proxy's tokenizer, or a processor that has it.
        max_length (`int`, *optional*):
            Tokens kept of a row. A row without any label left stays in place, all its labels −100.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end of a long row is kept, `"keep_start"` or `"keep_end"`.
        completion_only (`bool`, *optional*):
            Whether only the completion of a prompt and completion is trained (`completion_only_loss`). `None` is
            `True`.
        assistant_only (`bool`, *optional*, defaults to `False`):
            Whether only the assistant's turns are trained (`assistant_only_loss`).
        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            The column of plain texts.
        target_eos_token (`str`, *optional*):
            End of sequence that preparing the dataset for the target wrote into its texts, as `SFTTrainer` does; the
            proxy's own takes its place.

    Raises:
        TypeError: If `processing_class` is no tokenizer.
        ValueError: If the dataset has no raw columns, an option is unknown, or row 0 cannot be tokenised.
    """

    dataset: Any
    processing_class: Any
    _: KW_ONLY
    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    completion_only: bool | None = None
    assistant_only: bool = False
    dataset_text_field: str = "text"
    target_eos_token: str | None = None
    raw_format: RawFormat = field(init=False)
    chat_template: str | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Finds the tokenizer, the format and the chat template, and tries the first row."""
        tokenizer = self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = getattr(tokenizer, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class is a {type(self.processing_class).__name__}, which is no tokenizer and has none as "
                "`.tokenizer`. Fix: pass the proxy's own, such as `AutoTokenizer.from_pretrained(...)`."
            )
        # A frozen instance is written to only while it is made.
        object.__setattr__(self, "processing_class", tokenizer)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} keeps no token. Fix: set it to at least 1, or to None.")
        if self.truncation_mode not in get_args(TruncationMode):
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} is unknown. Fix: set it to 'keep_start' or 'keep_end'."
            )
        columns = getattr(self.dataset, "column_names", None)
        if columns is None:
            first = self.dataset[0] if len(self.dataset) else None
            columns = list(first) if isinstance(first, Mapping) else []
        raw_format = find_raw_format(columns, dataset_text_field=self.dataset_text_field)
        if raw_format is None:
            raise ValueError(
                "The dataset has no raw rows that the proxy's tokenizer could read, only the columns "
                f"{sorted(columns)}. It needs 'messages', 'prompt' and 'completion', or {self.dataset_text_field!r}. "
                "Fix: keep the raw columns in the training dataset, or pass `ProxyModel(..., dataset=...)` with the "
                "same rows in the same order, tokenised by the proxy's tokenizer."
            )
        object.__setattr__(self, "raw_format", raw_format)
        if self.assistant_only and tokenizer.chat_template is not None:
            object.__setattr__(self, "chat_template", find_training_template(tokenizer))
        if len(self.dataset):
            self[0]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        position = range(len(self))[index]
        return self._tokenize_row(position, self.dataset[position])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """Rows in one reading of the dataset, as `datasets` and torch's fetchers ask for them."""
        positions = [range(len(self))[index] for index in indices]
        rows = fetch_rows(self.dataset, positions)
        return [self._tokenize_row(position, row) for position, row in zip(positions, rows, strict=True)]

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, else its end of sequence, else 0."""
        known = (self.processing_class.pad_token_id, self.processing_class.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)

    def collate(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """[`collate_rows`] with this tokenizer's padding token."""
        return collate_rows(rows, pad_token_id=self.pad_token_id)

    def _tokenize_row(self, index: int, row: Any) -> dict[str, list[int]]:
        parts = read_raw_row(index, row, self.raw_format, dataset_text_field=self.dataset_text_field)
        if isinstance(parts[0], str):
            input_ids, is_label = self._tokenize_texts([str(part) for part in parts])
        else:
            self._check_chat_template(row)
            try:
                input_ids, is_label = self._tokenize_messages([list(part) for part in parts], row)
            except Exception as error:
                columns = list_raw_columns(self.raw_format)
                if isinstance(error, AssistantTurnsError):
                    raise ValueError(
                        f"Row {index} of the proxy's dataset, {' and '.join(map(repr, columns))}: {error}"
                    ) from error
                # Templates raise what they like, and none of it says which row it was.
                problem = f"cannot be rendered by the chat template ({type(error).__name__}: {error})"
                raise malformed_row(index, columns, problem, self.raw_format) from error
        labels = [token if bit else -100 for token, bit in zip(input_ids, is_label, strict=True)]
        kept = slice(None)
        if self.max_length is not None:
            kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        return {"input_ids": input_ids[kept], "labels": labels[kept]}

    def _tokenize_texts(self, parts: Sequence[str]) -> tuple[list[int], list[bool]]:
        if self.assistant_only:
            raise ValueError(
                "assistant_only=True (`assistant_only_loss`), but the dataset's rows are plain texts, which have no "
                "assistant turns. Fix: leave it out, or give messages with `role` and `content`."
            )
        *prompt, trained = parts
        if self.target_eos_token:
            trained = trained.removesuffix(self.target_eos_token)
        eos_token = self.processing_class.eos_token
        if eos_token is not None and not trained.endswith(eos_token):
            trained += eos_token
        input_ids = list(self.processing_class(text="".join([*prompt, trained]))["input_ids"])
        prompt_ids = self.processing_class(text=prompt[0])["input_ids"] if prompt else []
        return input_ids, self._mask_prompt(prompt_ids, input_ids)

    def _tokenize_messages(self, parts: Sequence[list[Any]], row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        tokenizer = self.processing_class
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        settings = {"chat_template": self.chat_template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
        messages = [message for part in parts for message in part]
        prompt_ids: Sequence[int] = []
        if len(parts) > 1:
            prompt_ids = tokenizer.apply_chat_template(
                parts[0], tokenize=True, return_dict=True, add_generation_prompt=True, **settings
            )["input_ids"]
        if self.assistant_only:
            input_ids, is_assistant = mask_assistant_turns(tokenizer, messages, settings)
        else:
            encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
            input_ids = list(encoding["input_ids"])
            is_assistant = [True] * len(input_ids)
        in_completion = self._mask_prompt(prompt_ids, input_ids)
        return input_ids, [first and second for first, second in zip(in_completion, is_assistant, strict=True)]

    def _check_chat_template(self, row: Mapping[str, Any]) -> None:
        tokenizer = self.processing_class
        if tokenizer.chat_template is None and "chat_template" not in (row.get("chat_template_kwargs") or {}):
            raise ValueError(
                f"The dataset's rows are conversations, but the proxy's tokenizer ({type(tokenizer).__name__} "
                f"{tokenizer.name_or_path!r}) has no chat template. Fix: set `tokenizer.chat_template`, or use the "
                "tokenizer of a chat model."
            )

    def _mask_prompt(self, prompt_ids: Sequence[int], input_ids: Sequence[int]) -> list[bool]:
        """The completion starts where prompt and whole diverge: their boundary may lie within a token."""
        masked = common_prefix_length(prompt_ids, input_ids) if self.completion_only is not False else 0
        return [False] * masked + [True] * (len(input_ids) - masked)
