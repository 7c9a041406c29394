"""The command line: one file per command, the table of commands, and shared options."""
