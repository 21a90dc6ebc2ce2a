"""Alignment: pairs and groups of answers, losses of their log-probabilities, one update."""
