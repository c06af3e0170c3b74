"""Figures for W&B or CSV files."""
