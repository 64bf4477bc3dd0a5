"""Measurements of the real code paths; docs/performance.md explains what they found."""
