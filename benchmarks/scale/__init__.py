"""A training at the full size of real models, with random weights, and what memory it takes."""
