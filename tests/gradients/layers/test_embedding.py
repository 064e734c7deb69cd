"""Embeddings whose forward is their own: which rows they look up, and what they do with them, they tell themselves."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.layers.embedding import EmbeddingLayer
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.verification import verify_directions
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import VOCAB_SIZE, PlainLanguageModel, tiny_model
from tests.support.trainers import collate, tiny_rows

TOLERANCE = 1e-5


class _Shifted(nn.Embedding):
    """As OPT's and BART's positions; 5 becomes the padding id, of which autograd takes no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input + 2) % VOCAB_SIZE)


class _Indexed(nn.Embedding):
    """As Whisper's positions: past `functional.embedding`, so that the padding id has a gradient after all."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input.flip(1).flip(1)]


class _Masked(nn.Embedding):
    """Some tokens have no embedding, others the half of one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (input % 3)[..., None] / 2.0


class _Normalized(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1) * 4.0


class _Added(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5


class _OfItsShape(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).view(*input.shape, self.embedding_dim)


class _Mean(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return (super().forward(input) + super().forward((input + 1) % VOCAB_SIZE)) / 2


def _model(kind: type[nn.Embedding], padding_idx: int | None = 7) -> nn.Module:
    model = PlainLanguageModel()
    model.embedding = kind(VOCAB_SIZE, 16, padding_idx=padding_idx)
    nn.init.normal_(model.embedding.weight)
    return model


def _error(model: nn.Module) -> float:
    rows = example_rows()
    return relative_error(batched_gradients(model, rows)[1], looped_gradients(model, rows)[1])


@pytest.mark.parametrize("kind", [_Shifted, _Indexed, _Masked])
def test_what_looks_rows_up_has_a_rule(kind: type[nn.Embedding], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        assert _error(_model(kind)) < TOLERANCE
    assert not caplog.records


@pytest.mark.parametrize("kind", [_Normalized, _Added, _OfItsShape, _Mean])
def test_what_does_more_is_left_to_autograd(kind: type[nn.Embedding], caplog: pytest.LogCaptureFixture) -> None:
    model = _model(kind)
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        assert _error(model) < TOLERANCE
        assert _error(model) < TOLERANCE
    (record,) = caplog.records
    assert f"the layer 'embedding' ({kind.__name__}) has no rule of its own" in record.getMessage()


def test_a_scale_is_rounded_as_the_layer_rounds_it() -> None:
    model = tiny_model("gemma2", hidden_size=36, tie_word_embeddings=False).bfloat16()
    layer = EmbeddingLayer("embedding", model.model.embed_tokens)
    ids = torch.tensor([[3, 4, 4], [9, 3, 5]])
    kept = layer.keep((ids,), {}, 2, 3)
    assert kept is not None and kept[..., 0].long().equal(ids)
    assert set(kept[..., 1].unique().tolist()) == {float(torch.tensor(36**0.5).bfloat16())}


@pytest.mark.parametrize("kind", [_Shifted, _Masked])
def test_derivatives_along_directions_are_the_same(kind: type[nn.Embedding]) -> None:
    model = _model(kind)
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    assert verify_directions(model, find_trained_modules(model), rows, device=torch.device("cpu")) < TOLERANCE
