"""rpc-server: sessions, buffers, limits, listening."""
