"""The command line: ``eua COMMAND``. Each command has a file with its options and its code."""
