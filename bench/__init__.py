"""Benchmarks of fastft beside its peers: ``python -m bench SUITE``; see docs/benchmarks.md."""
