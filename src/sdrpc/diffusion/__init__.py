"""From a checkpoint to a picture: files, configurations, prompts, samplers."""
