"""The checkpoints of the integration tests, here too."""

from tests.integrations.conftest import llama, quiet

__all__ = ["llama", "quiet"]
