"""`SpiceSFTTrainer`, apart from the rest because it needs TRL."""

from __future__ import annotations

from trl import SFTTrainer

from spice_trainer.trainer.attach import SpiceTrainerMixin


class SpiceSFTTrainer(SpiceTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains each step on what SPICE picks: `SpiceSFTTrainer(..., sampler=SpiceSampler())`."""
