"""Writes the table into README."""

from tests.bad_input.table import README, as_markdown, in_readme

if __name__ == "__main__":
    before, _, after = in_readme()
    README.write_text(before + as_markdown() + after, encoding="utf-8")
