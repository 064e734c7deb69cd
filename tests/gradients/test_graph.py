"""What a loss depends on, against small graphs that can be read off."""

from __future__ import annotations

import torch
from torch import nn

from spice_trainer.gradients.graph import LossGraph


def test_weights_and_calls_of_a_loss_are_told_from_those_beside_it() -> None:
    used, shared, beside = (nn.Linear(3, 3) for _ in range(3))
    hidden = used(torch.randn(2, 3))
    kept, thrown = shared(hidden), shared(hidden.flip(0))
    beside(hidden)
    loss = kept.relu().sum()
    loss_value = loss * 2
    loss_value.backward(inputs=[hidden])
    graph = LossGraph(loss_value)
    assert graph.has_weight(used.weight) and graph.has_weight(shared.bias) and not graph.has_weight(beside.weight)
    assert graph.has_node(kept.grad_fn) and graph.has_node(hidden.grad_fn) and not graph.has_node(thrown.grad_fn)


def test_a_loss_without_a_graph_depends_on_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert not LossGraph(weight.detach().sum()).has_weight(weight)
    assert LossGraph(weight.to(torch.bfloat16).sum()).has_weight(weight)
