"""Which tokens of a conversation its assistant wrote, as a chat template renders them.

Chat templates with `{% generation %}` tags say it themselves. For others the assistant's turn t is what the rendering
of messages 0..t adds to that of messages 0..t−1 followed by the generation prompt, provided both are beginnings of
the whole rendering.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIXES = (
    "Fix: put what the assistant writes between {% generation %} and {% endgeneration %} in "
    "`tokenizer.chat_template`, or train on all tokens (`assistant_only_loss=False`)."
)


class AssistantTurnsError(ValueError):
    """A conversation whose assistant tokens cannot be told from the others."""


def find_training_template(tokenizer: Any) -> str | None:
    """TRL's version with generation tags of the tokenizer's own chat template, which trains the target too.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with a chat template.

    Returns:
        `str` or `None`: `None` if the template has tags already, if TRL does not know it, or without TRL.
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
    """Tokenises a conversation and tells which tokens the assistant wrote, its end of turn included.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with a chat template.
        messages (`Sequence[Mapping[str, Any]]`):
            The conversation.
        template_kwargs (`Mapping[str, Any]`):
            What `apply_chat_template` is told: `chat_template`, `tools` and variables of the template.

    Returns:
        `tuple[list[int], list[bool]]`: S token ids, and S times whether the assistant wrote it.

    Raises:
        AssistantTurnsError: If the template has no tags and does not render the beginning of a conversation as it
            renders it in the whole, or if no token is the assistant's.
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
            f"chat template whose tags enclose nothing. {_FIXES}"
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
                f"where its header ends when nothing comes before. {_FIXES}"
            )
        before = render(turn, add_generation_prompt=True)
        after = render(turn + 1, add_generation_prompt=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise AssistantTurnsError(
                f"message {turn} is the assistant's, but the chat template has no {{% generation %}} tags and renders "
                f"the conversation up to this message differently when more follows, or the generation prompt "
                f"differently from the message's beginning, so which tokens are the assistant's is unknown. {_FIXES}"
            )
        start, stop = count_tokens(before), count_tokens(after)
        is_assistant[start:stop] = [True] * (stop - start)
    return input_ids, is_assistant
