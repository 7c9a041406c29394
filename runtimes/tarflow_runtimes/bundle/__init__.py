"""The format on disk: the reader, and how far a computed array may be from its reference."""
