"""Rewrites that are about to go."""
