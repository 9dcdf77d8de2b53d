"""Stage: candidates, their checks and their timings → a config.

`_candidates` says what could be tried and `_shares` what is worth it; `_trials` proves and times, `_choose` decides for each
kind of layer, `_confirm` and `_rivals` race the result on the whole model. `_tune` goes through all of that, on several ranks
with `_ranks`.
"""
