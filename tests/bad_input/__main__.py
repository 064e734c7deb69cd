"""Writes docs/errors.md."""

from tests.bad_input.table import ERRORS, as_markdown

if __name__ == "__main__":
    ERRORS.write_text(as_markdown(), encoding="utf-8")
