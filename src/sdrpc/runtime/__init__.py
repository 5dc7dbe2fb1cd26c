"""Lowered graphs on devices, and their cache on disk. Needs numpy, not torch."""
