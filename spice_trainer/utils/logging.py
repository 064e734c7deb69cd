"""The package's logger, `spice_trainer`.

SPICE says at the beginning of a run what will happen and warns where a setting does not fit. Both would be lost at
Python's default level, so when training starts the logger gets a handler if nobody configured one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("spice_trainer")

# What a terminal obeys or draws out of order: all controls but tab and line feed, and those of direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with its control characters escaped: names of folders and values of files may hold any."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


logger.addFilter(_escape)


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


@contextmanager
def warning_of_failure(action: str) -> Iterator[None]:
    """Turns an error in the block into a warning: a report that fails may not end a run that has trained."""
    try:
        yield
    except Exception as error:
        logger.warning("SPICE: %s failed (%s: %s). The result is not affected.", action, type(error).__name__, error)
