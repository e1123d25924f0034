"""Benchmarks: `python -m bench SUITE`. What each suite measures is in its module's header."""
