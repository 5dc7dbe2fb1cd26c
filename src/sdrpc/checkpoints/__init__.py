"""Model files as named, typed tensors that stay on disk: safetensors, GGUF, diffusers directories."""
