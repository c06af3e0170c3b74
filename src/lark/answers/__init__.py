"""Answers: found in text and checked against the gold answer."""
