"""The report of a bundle: figures in one HTML file, for a person to look at after an export."""
