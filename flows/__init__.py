"""Prefect flows over the verbs of ``segbatch``; they schedule, retry and show, and have no logic of their own."""
