"""How fast and how small sdrpc is, next to what it can be measured against: ``python -m bench`` (README.md here)."""
