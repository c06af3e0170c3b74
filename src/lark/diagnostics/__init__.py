"""Figures about scores and selections."""
