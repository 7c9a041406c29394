"""Pictures and arrays in files: read, write, and what pictures look like."""
