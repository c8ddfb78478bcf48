"""Passes over an ONNX graph: one subject per file, whose docstring lists its cases.

A pass is a function that rewrites a model in place. It returns whether it changed anything, or what its caller needs to
know of it: how many places it changed, the names of new outputs, what it left and why.
"""
