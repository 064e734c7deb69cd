"""The package's logger, `spice_trainer`.

SPICE says at the beginning of a run what will happen and warns where a setting does not fit. Both would be lost at
Python's default level, so when training starts the logger gets a handler if nobody configured one.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("spice_trainer")


def show_messages(*, is_main: bool = True) -> None:
    """Lets messages of level INFO through to the user's handlers, or to stderr where there are none.

    Processes but the main one only report errors: all would say the same.
    """
    if not is_main:
        logger.setLevel(logging.ERROR)
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
