"""Datasets: how their roots are recognised, listed and read. One file per dataset; ``registry.DATASETS`` names them."""
