"""Bugs of the field, planted one at a time; `python -m mutants`, in `tests/`, prints who caught it.

The rows are those of a catalogue of bugs that shipped in public RLHF code; `seen` has projects and
the numbers of their threads. `sample.py` is about mutants that nobody wrote.
"""
