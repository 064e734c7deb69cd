"""The training rows as a proxy model with a tokenizer of its own reads them.

Row i is row i of the raw dataset, tokenised when it is asked for, with the labels that TRL's `SFTTrainer` would give:

| columns | tokens | label tokens |
|---|---|---|
| `prompt`, `completion` (texts) | prompt, completion, end of sequence | those behind what prompt and whole share |
| `prompt`, `completion` (messages) | the chat template of both | those behind what prompt and whole share |
| `messages` | the chat template | all |
| `text` | text, end of sequence | all |

Where only the assistant's turns are trained, chat templates with `{% generation %}` tags say which tokens those are.
For others the assistant's turn t is what the rendering of messages 0..t adds to that of messages 0..t−1 followed by
the generation prompt, provided both are beginnings of the whole rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spice_trainer.data.raw_rows import RawFormat, find_raw_format, list_raw_columns, malformed_row, read_raw_row
from spice_trainer.data.rows import fetch_rows
from spice_trainer.utils.logging import logger

TruncationMode = Literal["keep_start", "keep_end"]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIX_TEMPLATE = (
    "Fix: put what the assistant writes between {% generation %} and {% endgeneration %} in "
    "`tokenizer.chat_template`, or train on all tokens (`assistant_only_loss=False`)."
)


def collate_rows(rows: Sequence[Mapping[str, Sequence[int]]], *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Right-pads N tokenised rows into `input_ids`, `attention_mask` and `labels` (−100) of shape `(N, S)`."""
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

    Options mean what they mean in `SFTConfig`: `completion_only` is its `completion_only_loss` (`None` is `True`),
    `assistant_only` its `assistant_only_loss`. Nothing is copied or kept, and no random state is touched. Row 0 is
    tokenised on creation, so that what doesn't fit shows there and not in the middle of a run.

    `dataset` is anything with a length whose items are dicts; `tools` and `chat_template_kwargs` are handed to the
    chat template, other columns are ignored. A row that `max_length` leaves without any label stays in place, all its
    labels −100. `target_eos_token` is the end of sequence that preparing the dataset for the target wrote into its
    texts, as `SFTTrainer` does; the proxy's own takes its place.
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
        first = fetch_rows(self.dataset, [0])[0] if len(self.dataset) else None
        columns = getattr(self.dataset, "column_names", None)
        if columns is None:
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
        images = sorted({"image", "images"} & set(columns))
        if images:
            logger.warning("SPICE: rows are scored by their text alone: %s is not read.", " and ".join(images))
        if self.assistant_only and tokenizer.chat_template is not None:
            object.__setattr__(self, "chat_template", find_training_template(tokenizer))
        if len(self.dataset):
            self._tokenize_row(0, first)

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


class AssistantTurnsError(ValueError):
    """A conversation whose assistant tokens cannot be told from the others."""


def find_training_template(tokenizer: Any) -> str | None:
    """TRL's version with generation tags of the tokenizer's own chat template, which trains the target too.

    `None` if the template has tags already, if TRL does not know it, or without TRL.
    """
    if _GENERATION_TAG.search(tokenizer.get_chat_template()):
        return None
    try:
        from trl.chat_template_utils import get_training_chat_template

        template: str | None = get_training_chat_template(tokenizer)
    except (ImportError, ValueError):
        return None
    # Older versions of TRL return templates made for another purpose, without tags.
    return template if template is not None and _GENERATION_TAG.search(template) else None


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens two sequences share."""
    for length, (token, other) in enumerate(zip(first, second, strict=False)):
        if token != other:
            return length
    return min(len(first), len(second))


def mask_assistant_turns(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """S token ids of a conversation, and S times whether the assistant wrote it, its end of turn included.

    `template_kwargs` is what `apply_chat_template` is told. An [`AssistantTurnsError`] if the template has no tags and
    does not render the beginning of a conversation as it renders it in the whole, or if no token is the assistant's.
    """
    template = tokenizer.get_chat_template(template_kwargs.get("chat_template"), template_kwargs.get("tools"))
    # Only fast tokenizers know which characters a token stands for, which the tags need.
    if tokenizer.is_fast and _GENERATION_TAG.search(template):
        encoding = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **template_kwargs
        )
        input_ids = list(encoding["input_ids"])
        is_assistant = [bool(bit) for bit in encoding["assistant_masks"]]
    else:
        input_ids, is_assistant = _mask_by_prefixes(tokenizer, messages, template_kwargs)
    if not any(is_assistant):
        raise AssistantTurnsError(
            "it has no assistant tokens, but only those are to be trained. Its roles are "
            f"{[message['role'] for message in messages]}; the likely cause is another name than 'assistant', or a "
            f"chat template whose tags enclose nothing. {_FIX_TEMPLATE}"
        )
    return input_ids, is_assistant


def _mask_by_prefixes(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
) -> tuple[list[int], list[bool]]:
    """The turns found by rendering the conversation up to each of them."""

    def render(end: int, *, add_generation_prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:end], tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
        return text

    def count_tokens(prefix: str) -> int:
        # A token that reaches over the boundary is the later part's, as it is between prompt and completion.
        prefix_ids = tokenizer(text=prefix, add_special_tokens=False)["input_ids"]
        return common_prefix_length(prefix_ids, input_ids)

    whole = render(len(messages), add_generation_prompt=False)
    encoding = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template_kwargs)
    input_ids = list(encoding["input_ids"])
    is_assistant = [False] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise AssistantTurnsError(
                "it begins with the assistant's turn, and a chat template without {% generation %} tags does not tell "
                f"where its header ends when nothing comes before. {_FIX_TEMPLATE}"
            )
        before = render(turn, add_generation_prompt=True)
        after = render(turn + 1, add_generation_prompt=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise AssistantTurnsError(
                f"message {turn} is the assistant's, but the chat template has no {{% generation %}} tags and renders "
                f"the conversation up to this message differently when more follows, or the generation prompt "
                f"differently from the message's beginning, so which tokens are the assistant's is unknown. "
                f"{_FIX_TEMPLATE}"
            )
        start, stop = count_tokens(before), count_tokens(after)
        is_assistant[start:stop] = [True] * (stop - start)
    return input_ids, is_assistant
