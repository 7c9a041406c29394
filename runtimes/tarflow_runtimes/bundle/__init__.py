"""The bundle format: its reader, and the tolerances for comparisons with the reference outputs."""
