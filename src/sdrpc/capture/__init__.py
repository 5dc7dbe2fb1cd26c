"""torch modules as ggml graphs: export, lowering, modules that run on a Device."""
