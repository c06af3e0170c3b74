"""Scores: one number per candidate, higher = take it first."""
