"""Pre- and post-processing around a ``Segmenter``: see ``pipeline``."""
