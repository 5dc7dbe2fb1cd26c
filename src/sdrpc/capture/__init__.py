"""torch modules as ggml graphs: export, lowering rules, programs on a Device, offloaded modules, a cache on disk.

``run``, ``lowered`` and ``cache`` work without torch: a graph from the cache runs on a remote device without it.
"""
