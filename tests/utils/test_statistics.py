"""Spearman's correlation against counting."""

from __future__ import annotations

import pytest
import torch

from spice_trainer.utils.statistics import spearman
from tests.support.theory_oracle import rank_correlation


def test_spearman_against_counting():
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        first = torch.randint(0, 5, (12,), generator=generator).double()
        second = torch.randint(0, 5, (12,), generator=generator).double()
        assert spearman(first, second) == pytest.approx(rank_correlation(first.tolist(), second.tolist()), abs=1e-12)
    assert spearman(torch.ones(5).double(), torch.arange(5).double()) is None
    assert spearman(torch.arange(2).double(), torch.arange(2).double()) is None
