"""Decisions about where branches run: pure functions from costs to plans."""
