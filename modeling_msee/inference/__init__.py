"""Figures of predictions; matplotlib is imported by `inference.figures` alone."""
