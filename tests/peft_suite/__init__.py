"""PEFT's own tests, run offline with fused layers: ``python -m tests.peft_suite``."""
