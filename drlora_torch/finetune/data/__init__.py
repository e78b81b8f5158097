"""From files and dataset ids to tokens: read, understand, check, tokenize, sum up."""
