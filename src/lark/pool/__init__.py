"""Pools: rows read, checked and kept."""
