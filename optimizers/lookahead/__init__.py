"""Lookahead, and the callback that evaluates its slow weights."""
