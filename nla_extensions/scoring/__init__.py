"""Anyone's texts for anyone's vectors, scored beside unrelated texts; not in §11."""
