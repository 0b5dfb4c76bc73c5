"""Models: the ``Segmenter`` protocol, the built-in architectures, loaders for other people's files.

``registry.source(reference)`` is the way in; see ``registry`` for how to add one.
"""
