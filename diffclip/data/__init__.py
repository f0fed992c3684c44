"""Image-text pairs: `sources` names the files, `shards` and `tables` read them, `captions` their texts; `pairs` is one
table over all of them, `training_pairs` its order in a training.
"""
