"""Passes of the student over the pool, cached."""
