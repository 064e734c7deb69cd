"""The command `spice-trainer`: names a subcommand and hands it the other arguments."""

from __future__ import annotations

import sys
from importlib.metadata import version


def _select(arguments: list[str]) -> None:
    # Imported only when it is asked for: it brings transformers and TRL.
    from spice_trainer.cli.select import main

    main(arguments)


def _pilot(arguments: list[str]) -> None:
    from spice_trainer.cli.pilot import main

    main(arguments)


COMMANDS = {
    "pilot": (_pilot, "Tell from a few hundred rows whether selecting could help."),
    "select": (_select, "Select a subset of a dataset with no target training."),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the subcommand that the first argument names; by default of the command line's."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        COMMANDS[name][0](arguments)
        return
    commands = "\n".join(f"  {command:10} {purpose}" for command, (_, purpose) in COMMANDS.items())
    usage = f"usage: spice-trainer [--version] COMMAND [--help] [ARGUMENTS]\n\n{commands}"
    if name == "--version":
        print(f"spice-trainer {version('spice-trainer')}")
    elif name in ("-h", "--help"):
        print(usage)
    else:
        problem = f"unknown command {name!r}" if name else "a command is needed"
        print(f"{usage}\n\nspice-trainer: error: {problem}", file=sys.stderr)
        raise SystemExit(2)
