"""A small real model beside a large one: its first layers, with the first ids of its vocabulary, trained a little.

    python -m tests.benchmarks.small_model --output FOLDER --data rows.jsonl[.gz] [--layers 3] [--vocabulary 4096]

The ids of a BPE vocabulary are in the order of its merges. Those below a bound are therefore a whole tokenizer, which
splits text further and loses none of it, and the first rows of the embedding fit it. What is left of the model is then
trained for `--seconds` CPU-seconds on one core (AdamW, its rate falling linearly to zero, batches of about 512 tokens)
on the even rows of the file, so that the odd rows are ones it has never seen, and saved as an ordinary folder with its
tokenizer.

Prints bits per byte of the responses of odd rows: of the large model, and of the small one before and after training.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.real_model import Row, load_model, read_rows

TOKENS_PER_BATCH = 512
# Rows whose lengths are sorted together before they are cut into batches.
WINDOW = 64


def slice_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer that has only the ids below `vocab_size` and the merges among them; the chat template stays."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise SystemExit(f"Only the ids of a BPE vocabulary are in merge order, and this is {state['model']['type']}.")
    vocabulary: dict[str, int] = state["model"]["vocab"]
    beyond = {token["content"] for token in state["added_tokens"] if token["id"] >= vocab_size}
    # Bytes are the single characters of a byte-level vocabulary: without all of them text would be lost.
    beyond |= {token for token, index in vocabulary.items() if len(token) == 1 and index >= vocab_size}
    if beyond:
        raise SystemExit(f"Special tokens or bytes have ids from {vocab_size:,} on: {sorted(beyond)[:5]}.")
    kept = {token: index for token, index in vocabulary.items() if index < vocab_size}
    state["model"]["vocab"] = kept
    # A merge is kept if its result is. Its parts have lower ids, so that they are kept too.
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) in kept]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


def slice_model(model: nn.Module, num_layers: int, vocab_size: int | None = None) -> nn.Module:
    """A copy of the first layers, the first rows of embedding and head, and the final norm."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    config.vocab_size = vocab_size or config.vocab_size
    small = type(model)(config)
    weights = model.state_dict()
    # Everything else has the shape it had, which loading checks.
    vocabularies = {
        id(module.weight) for module in (small.get_input_embeddings(), small.get_output_embeddings()) if module
    }
    names = {name for name, weight in small.named_parameters(remove_duplicate=False) if id(weight) in vocabularies}
    small.load_state_dict(
        {name: weights[name][: config.vocab_size] if name in names else weights[name] for name in small.state_dict()}
    )
    return small.to(model.dtype)


def batches(rows: Sequence[Row], seed: int) -> Iterator[list[Row]]:
    """Rows of similar length, `TOKENS_PER_BATCH` at most with their padding, without end."""
    shuffler = random.Random(seed)
    for _ in itertools.count():
        order = list(rows)
        shuffler.shuffle(order)
        for start in range(0, len(order), WINDOW):
            found = cut_batches(sorted(order[start : start + WINDOW], key=lambda row: len(row.input_ids)))
            shuffler.shuffle(found)
            yield from found


def cut_batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Consecutive rows, `TOKENS_PER_BATCH` at most with their padding; a longer row alone."""
    found: list[list[Row]] = []
    for row in rows:
        together = [*found[-1], row] if found else []
        if together and len(together) * max(len(other.input_ids) for other in together) <= TOKENS_PER_BATCH:
            found[-1] = together
        else:
            found.append([row])
    return found


def token_losses(model: nn.Module, rows: Sequence[Row], *, responses_only: bool) -> Tensor:
    """Negative log-likelihood in nats of every trained token of the rows, in one dimension."""
    length = max(len(row.input_ids) for row in rows)

    def pad(sequences: Iterator[list[int]], value: int) -> Tensor:
        return torch.tensor([sequence + [value] * (length - len(sequence)) for sequence in sequences])

    labels = pad((row.labels if responses_only else row.input_ids for row in rows), -100)[:, 1:]
    logits = model(
        input_ids=pad((row.input_ids for row in rows), 0),
        attention_mask=pad(([1] * len(row.input_ids) for row in rows), 0),
        use_cache=False,
    ).logits[:, :-1]
    mask = labels != -100
    return nn.functional.cross_entropy(logits[mask].float(), labels[mask], reduction="none")


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Bits of the responses, their end of turn included, over the bytes of their text."""
    model.eval()
    special = set(tokenizer.all_special_ids)
    labels = [label for row in rows for label in row.labels[1:] if label != -100 and label not in special]
    # A byte-level token has a character for each byte.
    num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(labels)))
    batched = cut_batches(sorted(rows, key=lambda row: len(row.input_ids)))
    nats = sum(float(token_losses(model, batch, responses_only=True).sum()) for batch in batched)
    return nats / math.log(2) / num_bytes


def train(model: nn.Module, rows: Sequence[Row], *, seconds: float, learning_rate: float, seed: int) -> int:
    """Trains all weights on whole conversations. Returns the number of tokens trained on."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    started, num_tokens = time.process_time(), 0
    for step, batch in enumerate(batches(rows, seed)):
        spent = time.process_time() - started
        if spent >= seconds:
            break
        # Also a short warm-up: AdamW's first steps are as long as its rate, whatever the gradient.
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - spent / seconds) * min(1.0, (step + 1) / 20)
        losses = token_losses(model, batch, responses_only=False)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += len(losses)
        if step % 100 == 0:
            print(f"  {spent:5.0f} CPU-seconds, {num_tokens:>9,} tokens: loss {losses.mean().item():.2f}", flush=True)
    return num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    large, large_tokenizer = load_model(arguments.model)
    model = slice_model(large, arguments.layers, arguments.vocabulary)
    tokenizer = slice_tokenizer(large_tokenizer, arguments.vocabulary)
    options = {"seed": arguments.seed, "max_tokens": arguments.max_tokens, "num_rows": arguments.rows}
    rows = read_rows(arguments.data, tokenizer, **options)
    seen = [row for row in rows if row.index % 2 == 0]
    held_out = [row for row in rows if row.index % 2 == 1][: arguments.held_out]
    theirs = {row.index: row for row in read_rows(arguments.data, large_tokenizer, **options)}

    sizes = [sum(parameter.numel() for parameter in either.parameters()) for either in (model, large)]
    print(f"{sizes[0]:,} parameters instead of {sizes[1]:,}")
    whole = bits_per_byte(large, large_tokenizer, [theirs[row.index] for row in held_out])
    before = bits_per_byte(model, tokenizer, held_out)
    num_tokens = train(
        model, seen, seconds=arguments.seconds, learning_rate=arguments.learning_rate, seed=arguments.seed
    )
    after = bits_per_byte(model, tokenizer, held_out)
    print(f"trained {arguments.seconds:.0f} CPU-seconds on {num_tokens:,} tokens")
    print(
        f"bits per byte of {len(held_out)} held-out responses: {before:.2f} before, {after:.2f} after; "
        f"{whole:.2f} of the large model"
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"saved in {arguments.output}")


if __name__ == "__main__":
    main()
