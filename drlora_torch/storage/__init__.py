"""Adapters on disk: our own files, the hub, and directories of PEFT."""
