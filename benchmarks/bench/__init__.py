"""`make bench`: this project beside other tools, interleaved in one run.

What a worker imports (worker, workloads, paths, peers) needs numpy and the peer's own library alone, because every peer
runs in an environment of its own.
"""
