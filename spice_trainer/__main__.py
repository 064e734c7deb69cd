"""`python -m spice_trainer COMMAND`: the same as `spice-trainer COMMAND`, and what `accelerate launch` starts."""

from spice_trainer.cli.main import main

main()
