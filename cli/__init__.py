"""The command line. Each command has a file of its own and imports the packages that it needs when it runs."""
