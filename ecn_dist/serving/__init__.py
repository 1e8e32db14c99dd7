"""Trained models in use: embedder, feature file, export."""
