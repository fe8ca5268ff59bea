"""Fitting: pure torch, no framework."""
