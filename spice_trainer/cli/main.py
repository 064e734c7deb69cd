"""The command `spice-trainer`: names a subcommand and hands it the other arguments."""

from __future__ import annotations

import importlib
import sys

# A module of this folder each, imported only when it is asked for: most bring transformers and TRL.
COMMANDS = {"select": "Select a subset of a dataset with no target training."}


def main(argv: list[str] | None = None) -> None:
    """Runs a subcommand.

    Args:
        argv (`list[str]`, *optional*): Arguments. Defaults to those of the command line.

    Raises:
        SystemExit: If the first argument names no command.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        commands = "\n".join(f"  {command:10} {purpose}" for command, purpose in COMMANDS.items())
        usage = f"usage: spice-trainer COMMAND [--help] [ARGUMENTS]\n\n{commands}"
        if name in ("-h", "--help"):
            print(usage)
            return
        print(usage, file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"spice_trainer.cli.{name}").main(arguments)
