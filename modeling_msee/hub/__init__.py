"""Checkpoints from elsewhere, and to the Hub."""
