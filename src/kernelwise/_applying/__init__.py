"""Stage: a plan → the model with its kernels, and the way back. Only `_apply` changes a model.

`_fuse` and `_join` make the calls that span several modules (a decoder layer, the head with its loss); `_bind` makes all
others, with `_guards` for what is looked at in a call.
"""
