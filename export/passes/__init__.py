"""Passes over the exported graph: one subject per file, each says whether it changed anything."""
