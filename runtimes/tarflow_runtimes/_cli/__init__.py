"""The command line: a table of verbs (`umbrella`) and one module per verb; nothing here is public."""
