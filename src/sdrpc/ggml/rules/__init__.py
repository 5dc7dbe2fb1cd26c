"""The rows of :data:`sdrpc.ggml.ops.OPS` by topic, each with its shape rule.

The facts are those of ggml's constructors (ggml.c) and of its reference backend (ggml-cpu/ops.cpp); where ggml is lax
and reads out of bounds, a rule is strict. Strides, buffers and aliasing are :mod:`sdrpc.ggml.validate`'s concern; only
SET and ACC, whose strides are parameters, are checked here.
"""
