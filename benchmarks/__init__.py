"""Measurements: each one checks the tokens it produced and ends in one line of JSON."""
