"""What runs a bundle: the one protocol, the table of engines with `auto`, and each engine in a room of its own."""
