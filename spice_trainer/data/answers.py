"""A row's answer with and without its instruction, for the ratio of their losses.

    row       bos  i i i  a b c            labels      ·  · · ·  a b c
    alone     bos         a b c            labels      ·         a b c
    without a bos   i i i  a b c  →  alone   a b c     labels in both passes   · b c

The answer begins at the row's first label, and everything from there on stays, in its order: later turns of a
conversation with their questions. Where the row begins with the model's bos token that stands before the answer alone.
Where it does not, the answer's first token has nothing before it to be predicted from, and so counts in neither loss.

Axes: S tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spice_trainer.data.rows import CandidateRow


def bos_tokens(model: Any) -> frozenset[int]:
    """The tokens that a model's configuration says a text begins with; empty if it says none."""
    token = getattr(getattr(model, "config", None), "bos_token_id", None)
    tokens = token if isinstance(token, list | tuple) else [token]
    return frozenset(int(one) for one in tokens if one is not None)


def split_answer(row: CandidateRow, bos: frozenset[int]) -> tuple[CandidateRow, CandidateRow] | None:
    """A row whose labels can be compared with those of its answer alone, and the answer alone.

    `bos` are the tokens that a text may begin with. `None` for an answer of one token without a bos before it, of
    which nothing is left.
    """
    if not row.can_be_padded:
        raise ValueError(
            f"strategy='ifd' compares an answer's loss with that of the answer alone, and row {row.index} of the "
            "training dataset cannot be cut: several texts are packed into it, or it has inputs other than token "
            "sequences. Fix: switch packing off, or choose another strategy."
        )
    start = int((row.labels[0] != -100).nonzero()[0, 0])
    has_bos = start > 0 and int(row.inputs["input_ids"][0, 0]) in bos
    # The place from which on both predict the same tokens.
    first = start if has_bos else start + 1
    if not bool((row.labels[0, first:] != -100).any()):
        return None
    labels = row.labels.clone()
    labels[:, :first] = -100

    def keep(values: Tensor) -> Tensor:
        return torch.cat([values[:, :1], values[:, start:]], dim=1) if has_bos else values[:, start:]

    alone = keep(labels)
    whole = replace(row, labels=labels)
    return whole, replace(
        row,
        inputs={key: keep(value) for key, value in row.inputs.items()},
        labels=alone,
        num_tokens=alone.shape[1],
    )
