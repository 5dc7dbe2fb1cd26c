"""The APIs that people's tools speak. Each is a thin translation into a :class:`sdrpc.Request` and back."""
