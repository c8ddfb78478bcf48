"""Answer requests of named tensors with a loaded bundle: what Triton, Ray Serve and KServe have in common.

    ports        the tensors of a request and of its answer: names, dtypes, shapes, and texts as bytes
    operation    what a bundle is asked for: rows in, an answer for each row out
    tasks        the operations of the hub's tasks: text or an image in; a vector, labels or text out
    tensors      the operation of a graph: its own tensors in and out
    service      requests of many callers put together, answered, taken apart again
    batches      requests that wait at the same time, for servers that do not put them together themselves
    triton_model the Python backend of Triton Inference Server around a service

Nothing here is imported by ``transom.runtime``, and only ``triton_model`` needs a server's library.
"""
