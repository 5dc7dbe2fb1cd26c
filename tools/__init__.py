"""Tools for working on sdrpc. They are no part of the package."""
