"""The layers below the adapter, run once: their states on disk, and a model of the layers above that reads them.

    whole:  ids ─ embedding ─ frozen layers ─ adapted layers ─ norm ─ head
    top:    ids ─ states looked up by content ─ adapted layers ─ norm ─ head

The top model takes token ids and attention mask as the whole one does, so Trainer, scorer and evaluation run it
unchanged. A row, or the beginning of one, is found by its ids; one that was never stored is an error.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

# Rows of a file: what a killed run has to do again at most.
ROWS_OF_A_FILE = 128


class StoredStates:
    """Hidden states of rows, memory-mapped: `<folder>/<hash>.safetensors`, each of some rows, never changed.

    Several processes may add at the same time; what two of them compute is kept twice and read once.

    Args:
        folder (`Path`): Where the files are; one folder for each model, dtype and number of frozen layers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._states: dict[bytes, Tensor] = {}
        self._keys: list[bytes] = []
        for path in sorted(folder.glob("*.safetensors")):
            self._read(path)
        self._keys = sorted(self._states)

    def missing(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Those of some rows of token ids that are not stored, each once."""
        found = {_key(row): list(row) for row in rows}
        return [row for key, row in found.items() if key not in self._states]

    def add(self, rows: Sequence[Sequence[int]], states: Sequence[Tensor]) -> None:
        """Store rows and their states, whole or not at all when this is interrupted."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        name = hashlib.sha256(ids.numpy().tobytes() + lengths.numpy().tobytes()).hexdigest()[:20]
        self.folder.mkdir(parents=True, exist_ok=True)
        path, partial = (self.folder / f"{name}.{end}" for end in ("safetensors", "partial"))
        save_file({"states": torch.cat(list(states)), "ids": ids, "lengths": lengths}, partial)
        partial.replace(path)
        self._read(path)
        self._keys = sorted(self._states)

    def find(self, row: np.ndarray) -> Tensor:
        """States (tokens × hidden size) of a stored row, or of the beginning of one.

        Raises:
            KeyError: If no stored row begins so.
        """
        key = _key(row)
        place = bisect_left(self._keys, key)
        if place == len(self._keys) or not self._keys[place].startswith(key):
            raise KeyError(
                f"The frozen layers never ran on a row of {len(row)} tokens that begins with {row[:12].tolist()}. "
                "Store every row that is trained on, scored or evaluated first."
            )
        return self._states[self._keys[place]][: len(row)]

    def _read(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            # A view of the mapped file: pages are read when they are used.
            states, ids, lengths = (file.get_tensor(name) for name in ("states", "ids", "lengths"))
        ends = lengths.cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            self._states[_key(ids[start:end].numpy())] = states[start:end]


def _key(row: Any) -> bytes:
    """The ids such that a row's key begins with that of its beginning, in an order that keeps those together."""
    return np.asarray(row, dtype=">u4").tobytes()


class StateEmbedding(nn.Module):
    """Takes the place of an input embedding: token ids in, the stored states of their rows out, 0 for padding."""

    def __init__(self, states: StoredStates, embedding: nn.Embedding, dtype: torch.dtype, num_frozen: int) -> None:
        super().__init__()
        self.num_frozen = num_frozen
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.dtype = dtype
        self._states = states
        self._attention_mask: Tensor | None = None

    def note_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keeps the mask that the decoder is called with, which tells a row from its padding."""
        self._attention_mask = kwargs.get("attention_mask")

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look the rows up (rows × tokens, padded on the right)."""
        ids = input_ids.cpu().numpy()
        lengths = [ids.shape[1]] * len(ids)
        if (mask := self._attention_mask) is not None:
            lengths = mask.sum(-1).tolist()
            if mask.dim() != 2 or any(not row[:length].all() for row, length in zip(mask, lengths, strict=True)):
                raise ValueError("Stored states need rows padded on the right, and an attention mask of 0 and 1.")
        found = torch.zeros(*ids.shape, self.embedding_dim, dtype=self.dtype)
        for number, length in enumerate(lengths):
            found[number, :length] = self._states.find(ids[number, :length])
        return found.to(input_ids.device)


class _ReachedError(Exception):
    """Ends a forward where the adapted layers begin."""


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of layers to cut. Set frozen_states: false.")
    return layers


@torch.no_grad()
def frozen_states(model: PreTrainedModel, num_frozen: int, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What enters layer `num_frozen`, of rows of token ids, in one forward that ends there.

    Args:
        model (`PreTrainedModel`): The whole model without an adapter.
        num_frozen (`int`): Layers below.
        rows (`Sequence[Sequence[int]]`): Token ids.

    Returns:
        `list[Tensor]`: A tensor (tokens × hidden size) a row, on the CPU.
    """
    entering: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"]).cpu())
        raise _ReachedError

    device = next(model.parameters()).device
    length = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    handle = _layers(model)[num_frozen].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.eval()(input_ids=input_ids, attention_mask=mask, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return [states[: len(row)].clone() for states, row in zip(entering[0], rows, strict=True)]


def keep_last_layers(model: PreTrainedModel, num_layers: int, states: StoredStates) -> PreTrainedModel:
    """Turn a whole model into its last layers, fed with stored states; the same object, changed.

    Args:
        model (`PreTrainedModel`): A causal language model without an adapter.
        num_layers (`int`): Layers to keep.
        states ([`StoredStates`]): What enters them.
    """
    decoder, config = model.get_decoder(), model.config
    first = len(decoder.layers) - num_layers
    decoder.layers = nn.ModuleList(decoder.layers[first:])
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types[first:])
    config.tie_word_embeddings = False
    embedding = StateEmbedding(states, model.get_input_embeddings(), model.dtype, first)
    model.set_input_embeddings(embedding)
    decoder.register_forward_pre_hook(embedding.note_mask, with_kwargs=True)
    return model


def store_states(
    states: StoredStates, model: PreTrainedModel, num_layers: int, rows: Sequence[Sequence[int]], tokens_per_batch: int
) -> Iterator[tuple[int, int]]:
    """Run the frozen layers on the rows that are not stored, and check that the layers above then give the same.

    Args:
        states ([`StoredStates`]): Where they go.
        model (`PreTrainedModel`): The whole model; it has its last layers alone afterwards.
        num_layers (`int`): Layers above.
        rows (`Sequence[Sequence[int]]`): Token ids.
        tokens_per_batch (`int`): Tokens of a forward, padding included.

    Yields:
        `tuple[int, int]`: Rows done, and rows to do.

    Raises:
        ValueError: If the model is none whose lower layers can be left out so.
    """
    missing = sorted(states.missing(rows), key=len)
    num_frozen = len(_layers(model)) - num_layers
    with torch.no_grad():
        tried = torch.tensor([missing[0]], device=model.device) if missing else None
        expected = model.eval()(input_ids=tried, use_cache=False).logits if missing else None
    for start in range(0, len(missing), ROWS_OF_A_FILE):
        part = missing[start : start + ROWS_OF_A_FILE]
        found: list[Tensor] = []
        while len(found) < len(part):
            # Sorted by length: the last row of a batch is its longest.
            size = 1
            rest = part[len(found) :]
            while size < len(rest) and (size + 1) * len(rest[size]) <= tokens_per_batch:
                size += 1
            found += frozen_states(model, num_frozen, rest[:size])
        states.add(part, found)
        yield start + len(part), len(missing)
    if missing:
        top = keep_last_layers(model, num_layers, states)
        with torch.no_grad():
            logits = top(input_ids=tried, use_cache=False).logits
        # In bfloat16 a row among others is rounded otherwise than alone.
        error = float((logits - expected).float().norm() / expected.float().norm())
        if not error <= (1e-4 if model.dtype == torch.float32 else 0.05):
            raise ValueError(
                f"{type(model).__name__}: its last {num_layers} layers on stored states give logits that are "
                f"{error:.1g} (relative) from the whole model's. Set frozen_states: false."
            )
