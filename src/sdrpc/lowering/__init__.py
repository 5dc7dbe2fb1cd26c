"""torch modules as ggml graphs: capture, lowering rules by topic, and modules offloaded to a device."""
