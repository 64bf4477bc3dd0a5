"""Scores, tables and dense-CRF post-processing: numpy in, numpy out, nothing here imports the model."""
