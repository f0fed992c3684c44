"""Image-text pairs: the sources (`pairs`, `shards`) and their order in a training (`training_pairs`)."""
