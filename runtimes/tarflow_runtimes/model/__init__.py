"""What a user holds: `Flow`, `Sample`, `Guidance`; checks of arguments, seeded noise, density."""
