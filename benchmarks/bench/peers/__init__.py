"""One module per peer, with the functions ``versions()``, ``prepare(variant, model, paths)`` and
``open_session(variant, workload, inputs, paths)``.

``prepare`` writes files below ``paths.peer`` once and returns a note; what a library cannot do it raises.
"""
