"""One optimizer step: from routing and gradients to a growth event."""
