"""The command line: one file a verb, the table of verbs, and the options that several verbs share."""
