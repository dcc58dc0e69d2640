"""How much the numbers of §11 depend on the rounding of the weights."""
