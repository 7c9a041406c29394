"""Pictures and arrays in files."""
