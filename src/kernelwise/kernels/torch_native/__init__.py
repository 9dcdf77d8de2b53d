"""PyTorch's own fused operators, as functions by the roles of an operation: candidates for tuning, asked for by name.

They differ from what a layer's own code writes out in several operators; each is here only where it computes the same.
"""
