"""Pack the experts of a model, load packed ones, and save them: the side of Transformers."""
