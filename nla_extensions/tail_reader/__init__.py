"""A verbalizer in closed form that writes the last tokens of what v came from."""
