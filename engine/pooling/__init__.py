"""Models that turn a text into numbers: embeddings and scores. No cache, no tokens out.

A text is the unit of work. Texts of like length share a step, on a flat token axis; what a text's
numbers are does not depend on its neighbours.
"""
