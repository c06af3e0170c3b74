"""Embedded tasks and their programmatic teachers."""
