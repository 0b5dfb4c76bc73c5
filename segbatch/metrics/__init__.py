"""Metrics: one file per official evaluator; ``registry.BUILT_IN`` names them, ``base.Metric`` says what they are."""
