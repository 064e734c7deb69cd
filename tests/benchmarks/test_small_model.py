"""The small model that benchmarks cut from a large one: a whole tokenizer, and the weights it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.benchmarks.small_model import slice_model, slice_tokenizer
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow

VOCAB_SIZE = 400
KEPT = 300
TEXTS = (
    "the weather in the north is rather cold and the wind blows from the north",
    "  def function(argument):\n\treturn argument ** 2\n\n",
    "Größe, naïve café, 東京 and 🙂 were in no text that it was trained on",
    "",
)
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] + '\n' + message['content'] }}<|end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens, then bytes, then merges, as ids of a real byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [
        f"{first}{second}" for first in ("the", "north", "weather", "argu") for second in ("", "er", "ing", "ment")
    ]
    backend.train_from_iterator([" ".join(words), *TEXTS[:2]] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def test_a_sliced_tokenizer_loses_nothing(tokenizer: Any, tmp_path: Path) -> None:
    slice_tokenizer(tokenizer, KEPT).save_pretrained(tmp_path)
    small = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) > KEPT and len(small) == KEPT
    numbers = []
    for text in TEXTS:
        whole, ids = (either(text)["input_ids"] for either in (tokenizer, small))
        assert small.decode(ids) == tokenizer.decode(whole) == text
        assert all(token < KEPT for token in ids)
        numbers.append((len(whole), len(ids)))
    assert numbers[0][0] < numbers[0][1] < len(TEXTS[0]), "some of the merges are left, and not all"
    # What is left means what it meant.
    assert small.convert_ids_to_tokens(range(KEPT)) == tokenizer.convert_ids_to_tokens(range(KEPT))


def test_a_sliced_tokenizer_keeps_conversations(tokenizer: Any) -> None:
    small = slice_tokenizer(tokenizer, KEPT)
    messages = [{"role": "user", "content": "the wind"}, {"role": "assistant", "content": "blows"}]
    text = small.apply_chat_template(messages, tokenize=False)
    assert text == "<|start|>user\nthe wind<|end|>\n<|start|>assistant\nblows<|end|>\n"
    ids = small(text)["input_ids"]
    assert ids.count(0) == ids.count(small.eos_token_id) == 2 and small.pad_token_id == 1
    assert small.decode(ids) == text


def test_a_vocabulary_without_all_bytes_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SystemExit, match=r"bytes have ids from 200 on"):
        slice_tokenizer(tokenizer, 200)


@pytest.mark.parametrize("tied", [True, False])
def test_a_sliced_model_keeps_its_weights(tied: bool, tmp_path: Path) -> None:
    large = tiny_model(vocab_size=40, num_hidden_layers=3, tie_word_embeddings=tied)
    slice_model(large, 2, 25).save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert small.config.num_hidden_layers == 2 and small.config.vocab_size == 25
    theirs, ours = large.state_dict(), small.state_dict()
    assert {name for name in theirs if ".layers.2." in name} == theirs.keys() - ours.keys()
    for name, value in ours.items():
        is_vocabulary = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(value, theirs[name][:25] if is_vocabulary else theirs[name])
    is_one = small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert is_one == tied
    # The first layers compute what they computed, of the tokens that are left.
    input_ids = torch.tensor([[3, 24, 7, 11]])
    hidden = [model(input_ids, output_hidden_states=True).hidden_states[1] for model in (large, small)]
    torch.testing.assert_close(*hidden)


def test_all_the_vocabulary_is_kept_unless_asked() -> None:
    large = tiny_model()
    before = {name: value.clone() for name, value in large.state_dict().items()}
    small = slice_model(large, 1)
    assert small.config.vocab_size == large.config.vocab_size and large.config.num_hidden_layers == 2
    with torch.no_grad():
        small.get_input_embeddings().weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())
