"""Decoding on a device: what one is (`device`), those there are (`host`, `cuda`), and the loop over any (`loop`)."""
