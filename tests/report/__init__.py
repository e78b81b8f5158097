"""The figures, the report and its page in a browser."""
