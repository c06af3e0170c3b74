"""Pools that teachers are asked to write."""
