"""From a rate of requests to replicas: service times measured here, and a simulated queue.

    plan           the fewest replicas that keep a latency, and the alternatives
    service_times  how long a bundle takes for batches of 1, 2, 4, ... rows
    neighbours     other processes that are at work while that is measured
    queueing       requests that wait for replicas and are answered in batches

Nothing here is imported by ``transom.runtime``.
"""
