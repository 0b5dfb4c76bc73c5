"""Metrics: one file per official evaluator; ``registry.METRICS`` names them, ``base.Metric`` says what they are."""
