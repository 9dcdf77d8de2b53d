"""Stage: layer against kernel → checks.

`_groups` says which layers are alike; `_capture` takes what a model gives them, `_inputs` makes what it does not, `_cases`
makes more of both. `_observe` runs layer and kernel on that (`_calls`, on what is `_given`), `_exact` says what is right and
`_judge` how far off is too far. `_worker` runs code of others in a process of its own, which has the module by its
`_description`. `_check` goes through the cases of one layer and one kernel, `_verify` through a plan; `_prove` keeps what is
proven and what is not.
"""
