"""Stages: ingest, predict, evaluate. Plain work over one shard; nothing here knows which engine runs it."""
