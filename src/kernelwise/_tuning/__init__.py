"""Stage: candidates, their checks and their timings → a config.

`_candidates` says what could be tried and `_shares` what is worth it; `_trials` proves and times, `_choose` decides for each
kind of layer, `_confirm` and `_rivals` race the result on the whole model (`_races`), `_wholes` what can only be raced. `_tune`
goes through all of that, for a `_session`, on several ranks with `_ranks`.
"""
