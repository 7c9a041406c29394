"""Measurements of a bundle on an engine: agreement with PyTorch, the fastest plan, speed, the machine's limits."""
