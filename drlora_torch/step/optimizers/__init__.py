"""What drlora knows of optimizers: fresh state of a row, and the first steps of a newborn row."""
