"""The project's own samples, in the official formats of the sets they stand in for.

They were written for this project; nothing was taken from the real sets, though everyday phrases occur in both.
`python -m datasets_code.samples.generate` writes them again.
"""
