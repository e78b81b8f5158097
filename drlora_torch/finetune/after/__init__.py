"""What comes after a run: generate, evaluate, merge, export and push what it has trained."""
