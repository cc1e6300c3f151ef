"""Choices made from numbers alone: no model, no tensors, no files."""
