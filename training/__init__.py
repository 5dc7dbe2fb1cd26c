"""How the model that sdrpc ships was trained, and how good it is. Not part of the package."""
