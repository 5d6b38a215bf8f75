"""Weights of the PyTorch releases to checkpoints of this package, and back.

``cli.py`` is the command; ``convert.py`` and ``export.py`` are the two directions; ``table.py``
says which tensor is which parameter, ``rows.py`` how; the ``*_file.py`` read and write
containers without torch.
"""
