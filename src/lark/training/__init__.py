"""Weighted training of the student on a selection."""
