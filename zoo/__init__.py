"""Models, metrics, data, training, export and serving built on kzoo layers."""
