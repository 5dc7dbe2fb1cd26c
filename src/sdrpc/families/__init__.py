"""Model families: one file each, and the registry that knows them all."""
