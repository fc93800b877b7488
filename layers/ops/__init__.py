"""Shared maths: pure functions of `keras.ops`, with no layer and no import of kzoo."""
