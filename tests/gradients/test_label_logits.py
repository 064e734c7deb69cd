"""What a row's logits tell: against singular values, whatever its batch mates, and without a trace."""

import math

import pytest
import torch

from spice_trainer.gradients.label_logits import NUM_POSITION_BUCKETS, NUM_TOKEN_BUCKETS, LabelLogits, nuclear_norm
from tests.support.field_oracles import label_logits
from tests.support.models import ARCHITECTURES, VOCAB_SIZE, tiny_lora_model
from tests.support.traces import model_state, random_states
from tests.support.trainers import collate, tiny_rows


def told(model, rows, seed=1):
    batch = collate(rows)
    labels = batch.pop("labels")
    with LabelLogits(model, seed) as logits:
        return logits.compute(batch, labels), logits


def projections(logits, num_labels):
    """P and Q as matrices."""
    found = []
    for number, num_buckets in ((2**14, NUM_POSITION_BUCKETS), (VOCAB_SIZE, NUM_TOKEN_BUCKETS)):
        buckets, signs = logits._draw(number, num_buckets, torch.device("cpu"))
        matrix = torch.zeros(number, num_buckets, dtype=torch.float64)
        matrix[torch.arange(number), buckets] = signs.double()
        found.append(matrix)
    return found[0][:num_labels].T, found[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_and_sketch_are_those_of_the_logits_at_labels(architecture):
    model, rows = tiny_lora_model(architecture).eval(), tiny_rows(6)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    found, logits = told(model, rows)
    for place, row in enumerate(rows):
        expected = label_logits(model, row)
        assert float(found[place, 0]) == pytest.approx(float(torch.linalg.svdvals(expected).sum()), rel=1e-5)
        left, right = projections(logits, len(expected))
        assert torch.allclose(found[place, 1:], (left @ expected @ right).flatten(), atol=1e-4)
    assert not bool(found[2].any())


def test_a_row_does_not_depend_on_its_batch_and_nothing_is_left_behind():
    model, rows = tiny_lora_model("llama").train(), tiny_rows(5)
    before, random_before = model_state(model), random_states()
    together, _ = told(model, rows)
    for place, row in enumerate(rows):
        assert torch.allclose(told(model, [row])[0][0], together[place], rtol=1e-4, atol=1e-4)
    assert str(before) == str(model_state(model))
    assert str(random_before) == str(random_states())


def test_sketches_keep_distances_on_the_whole():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 12, 400, generator=generator)
    logits = LabelLogits(tiny_lora_model("llama"), 3)
    sketches = torch.stack([logits.sketch(row) for row in rows])
    ratios = torch.pdist(sketches) / torch.pdist(rows.flatten(1))
    assert abs(float(ratios.mean()) - 1.0) < 0.05 and float(ratios.std()) < 0.1
    other = LabelLogits(tiny_lora_model("llama"), 4)
    assert not torch.allclose(other.sketch(rows[0]), sketches[0])


@pytest.mark.parametrize("shape", [(1, 9), (7, 3), (20, 200), (30, 9000)])
def test_the_norm_is_the_sum_of_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 5 + 3
    assert nuclear_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix.double()).sum()), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nuclear_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix.double()).sum()), rel=1e-6)
    matrix[0, 0] = math.nan
    assert math.isnan(nuclear_norm(matrix))


def test_a_token_that_is_ruled_out_counts_as_nothing():
    model, rows = tiny_lora_model("llama"), tiny_rows(3)

    def rule_out(module, args, output):
        return output.masked_fill(torch.arange(VOCAB_SIZE) == 4, -math.inf)

    def zero(module, args, output):
        return output.masked_fill(torch.arange(VOCAB_SIZE) == 4, 0.0)

    found = []
    for hook in (rule_out, zero):
        handle = model.get_output_embeddings().register_forward_hook(hook)
        found.append(told(model, rows)[0])
        handle.remove()
    assert torch.equal(*found) and bool(found[0].isfinite().all())
