"""Where Kernelwise meets other libraries. Each module stands alone, needs its library, and is imported by name only.

`kernelwise.integrations.transformers` makes `KernelConfig` acceptable to `from_pretrained`. accelerate, FSDP, DDP and PEFT
need no module: what they do to a model, Kernelwise respects as it is.
"""
