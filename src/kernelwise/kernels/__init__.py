"""First-party kernels: functions by the roles of an operation, one package per backend, one module per operation.

Importing this package imports nothing else.
"""
