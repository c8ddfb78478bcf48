"""The command line. Each command lives in a file of its own and imports its room when it runs."""
