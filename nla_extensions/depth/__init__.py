"""What text can reach at every layer, and sweeps over layers from one set of sequences."""
