"""torch modules as ggml graphs: capture, lowering rules by topic, and modules that compute on a device."""
