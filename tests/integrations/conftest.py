from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integrations.checkpoints import Checkpoint, make_checkpoint

from gptqkit.hf.skeleton import quiet_transformers


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("GPTQKIT_BACKEND", raising=False)
    with quiet_transformers():
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """gptq v1, 4 bits, symmetric, float32 model."""
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama")
