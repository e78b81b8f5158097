"""What is watched, shown and kept while a run trains; each a callback of the Trainer."""
