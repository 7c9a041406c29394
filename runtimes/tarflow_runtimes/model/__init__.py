"""The public interface, `Flow`, `Sample` and `Guidance`, with argument checks, seeded noise and density."""
