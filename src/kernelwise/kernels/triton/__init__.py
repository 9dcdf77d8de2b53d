"""Kernels in Triton for GPUs (CUDA first; nothing in them is tied to CUDA), one module per operation.

Importing this package imports nothing else: Triton is needed only by the module of the operation that is used.
"""
