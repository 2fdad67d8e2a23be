"""Measurements side by side: see bench/run."""
