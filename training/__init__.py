"""Training streams: data, self-distilled targets, losses, the trainer, calibration and the model card.

Importing this package imports no torch; the modules that need it say so by importing it at their top.
"""
