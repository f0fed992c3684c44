"""Conversations about images: rows of any layout, the examples that a model learns from, a report on both."""
