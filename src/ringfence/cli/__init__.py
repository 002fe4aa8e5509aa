"""The command line: a thin user of the library, one file per command or concern."""
