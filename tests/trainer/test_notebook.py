"""A notebook: the one line works there, twice in a row too, and the summary is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CELLS = [
    """
import warnings; warnings.simplefilter("ignore")
from tests.support.trainers import make_trainer, SETTINGS, trained_indices
from transformers.utils.notebook import NotebookProgressCallback
from spice_trainer import SpiceConfig, attach_spice
trainer = make_trainer(OUTPUT_DIR, max_steps=3, disable_tqdm=False)
assert any(isinstance(item, NotebookProgressCallback) for item in trainer.callback_handler.callbacks)
""",
    "attach_spice(trainer, SpiceConfig(**SETTINGS))",
    # The cell is run again.
    "attach_spice(trainer, SpiceConfig(**SETTINGS))",
    "trainer.train()",
    "len(trained_indices(OUTPUT_DIR))",
]


def test_training_in_a_notebook(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(f"OUTPUT_DIR = {str(tmp_path)!r}"), *map(nbformat.v4.new_code_cell, CELLS)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    root = Path(__file__).parents[2]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}}).execute()
    shown = "".join(str(output) for output in notebook.cells[4].outputs)
    assert "SPICE summary" in shown and "Optimizer steps" in shown and "Training Loss" in shown
    assert notebook.cells[5].outputs[0]["data"]["text/plain"] == "3"
