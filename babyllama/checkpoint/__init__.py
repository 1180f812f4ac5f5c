"""Weights <-> files."""
