"""Image-text pairs: `sources` names the files, `folders` finds those of a folder, `shards`, `tables` and `columns` read
them as a `layout` says, `captions` their texts; `pairs` is one table over all of them, `training_pairs` its order in a
training, and `check` says what is wrong with it.
"""
