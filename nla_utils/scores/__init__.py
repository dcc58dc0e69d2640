"""Arrays in, numbers with intervals out: the rows of §11, their controls, curves and reranks. Loads no torch."""
