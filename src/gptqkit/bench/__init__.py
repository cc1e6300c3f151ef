"""Benchmarks that put gptqkit beside other tools; `gptqkit bench` runs them. Other tools live in environments of their own."""
