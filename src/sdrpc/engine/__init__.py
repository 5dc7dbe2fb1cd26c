"""ggml graphs as torch programs: the devices of this process."""
