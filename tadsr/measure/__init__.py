"""Metrics, perceptual distances, evaluation of models, and pictures beside each other."""
