"""What a terminal would obey is escaped in messages that quote folders and files."""

from __future__ import annotations

import pytest

from spice_trainer.utils.logging import logger, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain µ é 漢 😀 \u3000 two\n\tlines", "plain µ é 漢 😀 \u3000 two\n\tlines"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("over\rwritten\x08\x7f\x9b2J", "over\\rwritten\\x08\\x7f\\x9b2J"),
        ("right \u202eot tfel\u2066", "right \\u202eot tfel\\u2066"),
        ("\udcff\u2028", "\\udcff\\u2028"),
    ],
)
def test_controls_are_escaped(text: str, shown: str, caplog: pytest.LogCaptureFixture) -> None:
    assert printable(text) == shown
    logger.warning("SPICE: %s", text)
    assert caplog.messages == [f"SPICE: {shown}"]
