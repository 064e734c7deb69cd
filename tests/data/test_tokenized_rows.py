"""Rows tokenised for a proxy, against TRL's own preparation of the same raw rows by the same tokenizer."""

from __future__ import annotations

import json
import pickle
import random
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from spice_trainer.data.raw_rows import find_raw_format
from spice_trainer.data.rows import collate_row
from spice_trainer.data.tokenized_rows import TokenizedRows, collate_rows, find_training_template, mask_assistant_turns
from tests.support.models import tiny_lora_model
from tests.support.trainers import tiny_tokenizer, training_options
from tests.support.versions import before

pytestmark = pytest.mark.oldest

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_EXTRA_TOKENS = "additional_special_tokens" if before("transformers", "5") else "extra_special_tokens"
_SENTENCES = (
    "what is the name of this thing",
    "the answer is that it has no name at all",
    "tell me another one, naïve",
)
# The same words with and without tags; `tone` comes from the column `chat_template_kwargs`.
_HEADER = "{% if tone is defined %}{{ tone }} {% endif %}{% for message in messages %}"
_TURN = "{{ message['content'] + '<|im_end|>\n' }}"
_FOOTER = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TAGGED = (
    _HEADER
    + "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    + _TURN
    + "{% endgeneration %}{% else %}"
    + _TURN
    + "{% endif %}"
    + _FOOTER
)
UNTAGGED = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# No special token parts the turns, so tokens reach over their boundaries.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def bpe_tokenizer(chat_template: str | None = TAGGED, *, adds_special_tokens: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that characters, tokens and words are three things."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(_SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    if adds_special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        **{_EXTRA_TOKENS: list(_SPECIAL_TOKENS[3:])},
        chat_template=chat_template,
    )


def trl_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The same with the chat template of a family of models, of which TRL has a version with tags."""
    templates = pytest.importorskip("trl.chat_template_utils", reason="this version of TRL has no chat templates")
    if not hasattr(templates, f"{family}_chat_template"):
        pytest.skip(f"this version of TRL has no chat template of {family}")
    return bpe_tokenizer(getattr(templates, f"{family}_chat_template"))


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


MESSAGES = [
    {"messages": turns("what is the name", "it has no name")},
    {"messages": turns("tell me", "the answer", "another one", "naïve 🙂 thing", system="at all")},
    {"messages": turns("the name of this thing " * 4, "no")},
    {"messages": turns("tell", "me the", "answer")},
]
CONVERSATIONS = [
    {"prompt": turns("what is the name"), "completion": [{"role": "assistant", "content": "it has no name"}]},
    {"prompt": turns("tell me", "the answer", "another"), "completion": turns("x", "one, naïve", "all", "no")[1:]},
    {"prompt": turns("the name of this thing " * 4), "completion": [{"role": "assistant", "content": "no"}]},
]
TEXT_PAIRS = [
    {"prompt": "what is the na", "completion": "me of this thing"},
    {"prompt": "tell me", "completion": " another one</s>"},
    {"prompt": "", "completion": "the answer"},
    {"prompt": "the name of this thing " * 4, "completion": "no"},
]
TEXTS = [{"text": "what is the name"}, {"text": "no name at all</s>"}, {"text": "naïve 🙂 " * 8}, {"text": ""}]
WORDS = [{"prompt": "w3 w4", "completion": "w5 w6 w7"}, {"prompt": "w3", "completion": "w9 </s>"}]
TOOLS = [{"type": "function", "function": {"name": "name", "description": "the name", "parameters": {}}}]


def prepare(rows: list[dict[str, Any]], tokenizer: Any, output_dir: Path, **arguments: Any) -> tuple[Dataset, Any]:
    """What `SFTTrainer` makes of raw rows: its dataset, with their place as `row`, and its collator."""
    trainer = SFTTrainer(
        model=tiny_lora_model(),
        args=SFTConfig(**training_options(output_dir, bf16=False, **arguments)),
        train_dataset=Dataset.from_list([{**row, "row": number} for number, row in enumerate(rows)]),
        processing_class=tokenizer,
    )
    return trainer.train_dataset, trainer.data_collator


def assert_equal_to_trl(rows: TokenizedRows, prepared: Dataset, collate: Any) -> None:
    """Row by row; what TRL dropped has no label here."""
    # Older versions of TRL leave the labels to the collator, which reads the masks.
    columns = ["labels"] if "labels" in prepared.column_names else ["completion_mask", "assistant_masks"]
    kept = {row["row"]: {key: row[key] for key in ["input_ids", *columns] if key in row} for row in prepared}
    assert kept
    for number, row in enumerate(rows.__getitems__(list(range(len(rows))))):
        assert row == rows[number]
        if number in kept:
            expected, batch = collate([kept[number]]), rows.collate([row])
            assert {key: value.tolist() for key, value in batch.items()} == {
                key: value.tolist() for key, value in expected.items()
            }
        else:
            assert set(row["labels"]) == {-100} and len(row["input_ids"]) == rows.max_length
    if len(kept) > 1:
        expected, batch = collate(list(kept.values())), rows.collate([rows[number] for number in kept])
        assert all(torch.equal(batch[key], expected[key]) for key in expected) and batch.keys() == expected.keys()


CASES: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]] = {
    "messages": (MESSAGES, bpe_tokenizer, {}),
    "messages, completion only": (MESSAGES, bpe_tokenizer, {"completion_only_loss": True}),
    "messages, assistant only": (MESSAGES, bpe_tokenizer, {"assistant_only_loss": True}),
    "messages, assistant only, truncated": (MESSAGES, bpe_tokenizer, {"assistant_only_loss": True, "max_length": 30}),
    "messages, special tokens": (MESSAGES, lambda: bpe_tokenizer(adds_special_tokens=True), {}),
    "conversations": (CONVERSATIONS, bpe_tokenizer, {}),
    "conversations, all": (CONVERSATIONS, bpe_tokenizer, {"completion_only_loss": False}),
    "conversations, assistant only": (CONVERSATIONS, bpe_tokenizer, {"assistant_only_loss": True}),
    "conversations, all turns of the assistant": (
        CONVERSATIONS,
        bpe_tokenizer,
        {"assistant_only_loss": True, "completion_only_loss": False},
    ),
    "conversations, truncated": (CONVERSATIONS, bpe_tokenizer, {"max_length": 30}),
    "conversations, tokens over boundaries": (CONVERSATIONS, lambda: bpe_tokenizer(PLAIN), {}),
    "text pairs": (TEXT_PAIRS, bpe_tokenizer, {}),
    "text pairs, all": (TEXT_PAIRS, bpe_tokenizer, {"completion_only_loss": False}),
    "text pairs, truncated": (TEXT_PAIRS, bpe_tokenizer, {"max_length": 20}),
    "text pairs, the end kept": (TEXT_PAIRS, bpe_tokenizer, {"max_length": 20, "truncation_mode": "keep_end"}),
    "text pairs, special tokens": (TEXT_PAIRS, lambda: bpe_tokenizer(adds_special_tokens=True), {}),
    "text pairs, words": (WORDS, tiny_tokenizer, {}),
    "texts": (TEXTS, lambda: bpe_tokenizer(None), {}),
    "texts, truncated": (TEXTS, bpe_tokenizer, {"max_length": 5}),
    "texts, another column": (
        [{"body": row["text"]} for row in TEXTS],
        bpe_tokenizer,
        {"dataset_text_field": "body"},
    ),
    "tools": ([{**row, "tools": TOOLS} for row in MESSAGES], lambda: trl_tokenizer("qwen2_5"), {}),
    "tools as JSON": (
        [{**row, "tools": json.dumps(TOOLS)} for row in CONVERSATIONS],
        lambda: trl_tokenizer("qwen2_5"),
        {},
    ),
    "template variables": (
        [{**row, "chat_template_kwargs": {"tone": f"the {n}"}} for n, row in enumerate(CONVERSATIONS)],
        bpe_tokenizer,
        {},
    ),
    "Llama 3, assistant only": (
        MESSAGES,
        lambda: trl_tokenizer("llama3"),
        {"assistant_only_loss": True},
    ),
    "Qwen 2.5, assistant only": (
        CONVERSATIONS,
        lambda: trl_tokenizer("qwen2_5"),
        {"assistant_only_loss": True},
    ),
    "Qwen 3, prompt unlike its completion": (CONVERSATIONS, lambda: trl_tokenizer("qwen3"), {}),
    "Qwen 3, assistant only": (MESSAGES, lambda: trl_tokenizer("qwen3"), {"assistant_only_loss": True}),
}


# What TRL 0.24 does in another way, or not at all.
_SINCE_TRL_1 = {
    "conversations, tokens over boundaries": "masks as many tokens as the prompt has by itself",
    "text pairs": "masks as many tokens as the prompt has by itself",
    "text pairs, truncated": "masks as many tokens as the prompt has by itself",
    "text pairs, the end kept": "has no truncation_mode",
    "text pairs, special tokens": "masks as many tokens as the prompt has by itself",
    "text pairs, words": "masks as many tokens as the prompt has by itself",
    "texts, another column": "ends only texts in a column `text`",
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_trl(name: str, tmp_path: Path) -> None:
    if before("trl", "1") and name in _SINCE_TRL_1:
        pytest.skip(f"TRL 0.24 {_SINCE_TRL_1[name]}")
    raw, make_tokenizer, arguments = CASES[name]
    prepared, collate = prepare(raw, make_tokenizer(), tmp_path, **({"max_length": None} | arguments))
    options = {"completion_only_loss": "completion_only", "assistant_only_loss": "assistant_only"}
    rows = TokenizedRows(
        Dataset.from_list(raw),
        make_tokenizer(),
        **{options.get(key, key): value for key, value in arguments.items()},
    )
    assert_equal_to_trl(rows, prepared, collate)
    if "max_length" in arguments:
        assert len(prepared) < len(raw) or any(len(row["input_ids"]) == arguments["max_length"] for row in prepared)


@pytest.mark.parametrize("raw", [MESSAGES, CONVERSATIONS], ids=["messages", "conversations"])
def test_assistant_turns_without_tags_are_those_with_tags(raw: list[dict[str, Any]], tmp_path: Path) -> None:
    prepared, collate = prepare(raw, bpe_tokenizer(TAGGED), tmp_path, assistant_only_loss=True, max_length=None)
    rows = TokenizedRows(Dataset.from_list(raw), bpe_tokenizer(UNTAGGED), assistant_only=True)
    assert_equal_to_trl(rows, prepared, collate)


@pytest.mark.parametrize("template", [TAGGED, PLAIN], ids=["special tokens", "plain"])
def test_slow_tokenizers_find_assistant_turns_too(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe_tokenizer(template)
    messages = turns("tell me", "the answer", "another one", "naïve", "thing")
    expected = mask_assistant_turns(tokenizer, messages, {})
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert mask_assistant_turns(tokenizer, messages, {}) == expected


@pytest.mark.skipif(before("trl", "1"), reason="TRL 0.24 leaves the labels to its collator")
def test_datasets_prepared_for_another_tokenizer_keep_no_foreign_end_of_sequence(tmp_path: Path) -> None:
    for raw in (TEXT_PAIRS, TEXTS):
        tokenizer = bpe_tokenizer()
        tokenizer.eos_token = "<|im_end|>"
        plain = [{key: text.removesuffix("</s>") for key, text in row.items()} for row in raw]
        expected, collate = prepare(plain, tokenizer, tmp_path, max_length=None)
        # The target's tokenizer has left `</s>` in the texts, and its own `input_ids` beside them.
        prepared, _ = prepare(raw, bpe_tokenizer(), tmp_path, max_length=None)
        assert {"input_ids", "labels"} < set(prepared.column_names)
        assert all(row.get("completion", row.get("text")).endswith("</s>") for row in prepared)
        assert_equal_to_trl(TokenizedRows(prepared, tokenizer, target_eos_token="</s>"), expected, collate)


def test_a_tokenizer_without_end_of_sequence_adds_none() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None
    row = TokenizedRows([{"text": "no name"}], tokenizer)[0]
    assert row == {"input_ids": (ids := tokenizer("no name")["input_ids"]), "labels": ids}


def test_a_prompt_that_fills_the_length_leaves_no_label() -> None:
    rows = TokenizedRows([TEXT_PAIRS[3]], bpe_tokenizer(), max_length=10)
    assert rows[0]["labels"] == [-100] * 10
    assert collate_row(0, rows[0], rows.collate).num_label_tokens == 0


def test_batches() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate_rows(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    empty = collate_rows([{"input_ids": [], "labels": []}])
    assert all(value.shape == (1, 0) and value.dtype == torch.long for value in empty.values())


def test_padding_token() -> None:
    tokenizer = bpe_tokenizer()
    rows = TokenizedRows(TEXTS, tokenizer)
    assert rows.pad_token_id == 0
    tokenizer.pad_token = None
    assert rows.pad_token_id == 2
    assert rows.collate([rows[0], rows[2]])["input_ids"][0, -1] == 2
    tokenizer.eos_token = None
    assert rows.pad_token_id == 0


def test_a_dataset_like_any_other() -> None:
    rows = TokenizedRows(Dataset.from_list(TEXTS), bpe_tokenizer())
    assert len(rows) == 4 and rows[-1] == rows[3] and [*rows] == [rows[number] for number in range(4)]
    assert rows.__getitems__([2, -4]) == [rows[2], rows[0]]
    with pytest.raises(IndexError):
        rows[4]
    with pytest.raises(FrozenInstanceError):
        rows.max_length = 3  # type: ignore[misc]
    batches = list(DataLoader(rows, batch_size=2, collate_fn=rows.collate))
    assert torch.equal(batches[1]["labels"], rows.collate([rows[2], rows[3]])["labels"])
    assert len(TokenizedRows(Dataset.from_dict({"text": []}), bpe_tokenizer())) == 0


def test_nothing_random_and_everything_pickled() -> None:
    states = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state())
    rows = TokenizedRows(MESSAGES, bpe_tokenizer(UNTAGGED), assistant_only=True, max_length=40)
    copied = pickle.loads(pickle.dumps(rows))
    assert [*copied] == [*rows] and copied.collate([copied[0]])["labels"].tolist() == [rows[0]["labels"]]
    assert random.getstate() == states[0] and repr(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_rows_of_the_dataset_stay_as_they_are() -> None:
    raw = [{**row, "tools": json.dumps(TOOLS), "chat_template_kwargs": {"tone": "no"}} for row in CONVERSATIONS]
    before = json.dumps(raw)
    [*TokenizedRows(raw, bpe_tokenizer(), assistant_only=True)]
    assert json.dumps(raw) == before


def test_formats() -> None:
    assert find_raw_format(["input_ids", "labels"]) is None
    assert find_raw_format(["prompt", "input_ids"]) is None
    assert find_raw_format(["text", "completion", "prompt", "messages"]) == "prompt_completion"
    assert find_raw_format(["messages", "text"]) == "messages"
    assert find_raw_format(["text"]) == "text"
    assert find_raw_format(["body"]) is None
    assert find_raw_format(["body"], dataset_text_field="body") == "text"


def test_a_processor_gives_its_tokenizer() -> None:
    processor = SimpleNamespace(tokenizer=bpe_tokenizer())
    assert TokenizedRows(MESSAGES, processor)[1] == TokenizedRows(MESSAGES, processor.tokenizer)[1]


@pytest.mark.parametrize("processing_class", [None, "gpt2", SimpleNamespace(tokenizer=len)], ids=repr)
def test_other_objects_are_no_tokenizer(processing_class: Any) -> None:
    with pytest.raises(
        TypeError, match=r"which is no tokenizer and has none as `\.tokenizer`\. Fix: pass the proxy's"
    ):
        TokenizedRows(TEXTS, processing_class)


def test_rows_without_raw_columns_are_refused() -> None:
    dataset = Dataset.from_list([{"labels": [4], "input_ids": [4]}])
    message = (
        r"The dataset has no raw rows that the proxy's tokenizer could read, only the columns \['input_ids', "
        r"'labels'\]\. It needs 'messages', 'prompt' and 'completion', or 'text'\. Fix: keep the raw columns in the "
        r"training dataset, or pass `ProxyModel\(\.\.\., dataset=\.\.\.\)` with the same rows"
    )
    with pytest.raises(ValueError, match=message):
        TokenizedRows(dataset, bpe_tokenizer())
    with pytest.raises(ValueError, match=message):
        TokenizedRows([*dataset], bpe_tokenizer())


@pytest.mark.parametrize("raw", [MESSAGES, CONVERSATIONS], ids=["messages", "conversations"])
@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_tokenizer_without_chat_template_is_refused(raw: list[dict[str, Any]], assistant_only: bool) -> None:
    message = (
        r"The dataset's rows are conversations, but the proxy's tokenizer \(.*\) has no chat template\. Fix: set "
        r"`tokenizer\.chat_template`, or use the tokenizer of a chat model\."
    )
    with pytest.raises(ValueError, match=message):
        TokenizedRows(raw, bpe_tokenizer(None), assistant_only=assistant_only)
    own = [{**row, "chat_template_kwargs": {"chat_template": UNTAGGED}} for row in raw]
    rows = TokenizedRows(own, bpe_tokenizer(None), assistant_only=assistant_only)
    assert rows[1] == TokenizedRows(raw, bpe_tokenizer(TAGGED), assistant_only=assistant_only)[1]


MALFORMED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "missing": (TEXT_PAIRS[0], {"prompt": "no"}, r"'completion' is missing, the row is the columns \['prompt'\]"),
    "no row": (TEXT_PAIRS[0], "no", "'prompt' is missing, the row is a str"),
    "none": (
        TEXTS[0],
        {"text": None},
        r"'text' is of type NoneType\. Fix: correct the row \('text' must hold a text\)",
    ),
    "messages for a text": (TEXTS[0], {"text": turns("no")}, "'text' is of type list"),
    "a text for messages": (
        MESSAGES[0],
        {"messages": "no"},
        r"'messages' is of type str\. Fix: correct the row \('messages' must hold a list of messages with `role` and "
        r"`content`\), or leave it out of the dataset that the trainer is given",
    ),
    "empty": (MESSAGES[0], {"messages": []}, "'messages' is an empty list"),
    "no role": (MESSAGES[0], {"messages": [{"from": "user"}]}, "'messages' holds something else than messages with a"),
    "mixed": (
        TEXT_PAIRS[0],
        {"prompt": "no", "completion": turns("a")},
        "'prompt' and 'completion' are not both texts or both messages",
    ),
    "no content": (
        MESSAGES[0],
        {"messages": [{"role": "user", "content": 3}]},
        r"'messages' cannot be rendered by the chat template \(TypeError: ",
    ),
    "tools": (MESSAGES[0], {**MESSAGES[0], "tools": "{"}, r"'messages' cannot be rendered .* \(JSONDecodeError: "),
    "template": (
        MESSAGES[0],
        {"messages": turns("no"), "chat_template_kwargs": {"chat_template": "{{ raise_exception('roles') }}"}},
        r"'messages' cannot be rendered by the chat template \(TemplateError: roles\)",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(name: str) -> None:
    good, bad, message = MALFORMED[name]
    tokenizer = bpe_tokenizer()
    rows = TokenizedRows([good, bad], tokenizer)
    message = "Row 1 of the proxy's dataset is malformed: " + message
    with pytest.raises(ValueError, match=message):
        rows[1]
    with pytest.raises(ValueError, match=message):
        rows.__getitems__([0, -1])
    if isinstance(bad, Mapping) and find_raw_format(bad) == rows.raw_format:
        with pytest.raises(ValueError, match="Row 0 of the proxy's dataset is malformed"):
            TokenizedRows([bad], tokenizer)


def test_assistant_turns_that_cannot_be_told_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_trainer.data.tokenized_rows.find_training_template", lambda tokenizer: None)
    # Qwen 3 drops the thinking of all turns but the last.
    rows = TokenizedRows(MESSAGES, trl_tokenizer("qwen3"), assistant_only=True)
    message = (
        r"Row 1 of the proxy's dataset, 'messages': message 2 is the assistant's, but the chat template has no "
        r"\{% generation %\} tags and renders the conversation up to this message differently.*Fix: put what the "
        r"assistant writes between \{% generation %\} and \{% endgeneration %\} in `tokenizer\.chat_template`, or "
        r"train on all tokens \(`assistant_only_loss=False`\)\."
    )
    with pytest.raises(ValueError, match=message):
        rows[1]
    first = [{"messages": turns("a", "no")[1:]}]
    with pytest.raises(ValueError, match="Row 0 .*: it begins with the assistant's turn.*Fix: put what"):
        TokenizedRows(first, bpe_tokenizer(UNTAGGED), assistant_only=True)
    assert -100 in TokenizedRows(first, bpe_tokenizer(TAGGED), assistant_only=True)[0]["labels"]


@pytest.mark.parametrize("template", [TAGGED, UNTAGGED], ids=["tags", "prefixes"])
def test_conversations_without_assistant_are_refused(template: str) -> None:
    raw = [{"messages": [{"role": "user", "content": "no"}, {"role": "model", "content": "name"}]}]
    message = r"it has no assistant tokens, .* Its roles are \['user', 'model'\]; the likely cause .*Fix: put what"
    with pytest.raises(ValueError, match=message):
        TokenizedRows(raw, bpe_tokenizer(template), assistant_only=True)


def test_texts_have_no_assistant() -> None:
    for raw in (TEXTS, TEXT_PAIRS):
        with pytest.raises(
            ValueError, match="assistant_only=True .* plain texts, which have no assistant turns. Fix:"
        ):
            TokenizedRows(raw, bpe_tokenizer(), assistant_only=True)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length=0 keeps no token. Fix: set it to at least 1, or to None."):
        TokenizedRows(TEXTS, bpe_tokenizer(), max_length=0)
    with pytest.raises(ValueError, match="truncation_mode='middle' is unknown. Fix: set it to 'keep_start' or"):
        TokenizedRows(TEXTS, bpe_tokenizer(), truncation_mode="middle")  # type: ignore[arg-type]


def test_templates_of_trl_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trl_tokenizer("qwen3")
    assert "{%- generation %}" in str(find_training_template(tokenizer))
    assert find_training_template(bpe_tokenizer(TAGGED)) is None
    assert find_training_template(bpe_tokenizer(UNTAGGED)) is None
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    assert find_training_template(tokenizer) is None
