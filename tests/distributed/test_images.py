"""Rows with images on several processes: the picks of one process, LoRA on the vision tower included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import fork
from tests.support.trainers import trained_indices
from tests.support.versions import before

pytest.importorskip("PIL")
from tests.support.processors import NUM_IMAGES, make_image_trainer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(before("transformers", "5.18"), reason="processors are made otherwise"),
]
ONE_KIND = [1 + number % 2 for number in range(24)]


@pytest.mark.parametrize(
    ("config", "architecture", "num_images"),
    [
        ("multi_gpu", "llava", NUM_IMAGES),
        pytest.param("deepspeed_zero3", "llava", ONE_KIND, marks=pytest.mark.slow),
        pytest.param("deepspeed_zero3", "qwen2_vl", ONE_KIND, marks=pytest.mark.slow),
    ],
)
def test_picks_are_those_of_one_process(config: str, architecture: str, num_images: list[int], tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    options = [f"architecture={architecture}", "checkpointing=1", f"num_images={json.dumps(num_images)}"]
    fork(config, tmp_path, "images", *options).check()
    trainer = make_image_trainer(tmp_path / "alone", architecture, num_images=num_images)
    trainer.train()
    alone = trained_indices(tmp_path / "alone")
    assert len(alone) == 3
    for rank in range(2):
        assert json.loads((tmp_path / f"images.{rank}.json").read_text())["picks"] == alone
