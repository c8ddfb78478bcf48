"""One module per peer: ``versions()``, ``prepare(variant, model, paths)``, ``open_session(variant, workload, inputs, paths)``.

``prepare`` writes files below ``paths.peer`` once and returns a note for the results; what a library cannot do it raises.
"""
