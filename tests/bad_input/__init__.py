"""Everything that a user can get wrong, as data: what happens, when, and in which words.

`tests/bad_input/test_bad_input.py` plays every row. `python -m tests.bad_input` writes docs/errors.md from them.
"""
