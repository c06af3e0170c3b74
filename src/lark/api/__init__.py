"""Offers the parts of a run to scripts and notebooks."""
