"""What a ggml tensor and a ggml graph are. Imports numpy at most; knows neither sockets nor torch."""
