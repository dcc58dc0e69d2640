"""The frozen language model: loading, encoding, sampling, and what a CPU needs to be fast at them."""
