"""Stage: layer against kernel, model against model → timings.

`_compare` times calls in turns and knows nothing of models. `_measure` makes such calls of a layer, `_workload` and `_race` of
whole models, `_contenders` of what peers make of a model, and `_bench` puts all side by side.
"""
