"""The Format seam: how a QuantizedWeight becomes named tensors and a `quantization_config`, and back. Pure: no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from gptqkit.core.config import LinearSpec
from gptqkit.core.weight import QuantizedWeight


class Format(Protocol):
    """One on-disk layout. Local tensor names (e.g. "qweight") are appended to the linear's name with a dot."""

    @property
    def name(self) -> str:
        """One of core.config.FORMAT_NAMES."""

    @property
    def packed_name(self) -> str:
        """The local name of the packed codes: where this tensor is, there is a quantized linear."""

    @property
    def tensor_names(self) -> frozenset[str]:
        """Every local name the layout may use."""

    def refuses_spec(self, spec: LinearSpec, out_features: int, in_features: int, desc_act: bool) -> str | None:
        """Why a linear of this shape and spec cannot be stored, known before any work; None when it can."""

    def nbytes(self, spec: LinearSpec, out_features: int, in_features: int) -> int:
        """Bytes of all tensors of a linear of this shape and spec, as `encode` makes them."""

    def refuses(self, weight: QuantizedWeight) -> str | None:
        """Why this very weight cannot be stored without loss; None when it can."""

    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Local names to tensors, contiguous, on the weight's device. The input is untouched. Raises InputError when `refuses`."""

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedWeight:
        """The inverse of `encode`, from local names. Raises InputError naming a missing, misshapen or out-of-range tensor."""

    def shape(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], spec: LinearSpec) -> tuple[int, int]:
        """(out_features, in_features) from the shapes of a linear's tensors, reading (by local name) at most a few bytes."""

    def config(self, specs: Mapping[str, LinearSpec], skipped: list[str], *, desc_act: bool, details: Mapping[str, Any]) -> dict[str, Any]:
        """The `quantization_config` of config.json. `specs` maps every quantized linear's full name to its spec;
        `skipped` lists linears left in full precision. `details` are facts about how it was made: damp_percent, true_sequential,
        static_groups and order go where readers look for them, everything else into `meta`."""

    def specs(self, config: Mapping[str, Any], names: list[str]) -> dict[str, LinearSpec]:
        """The spec of each quantized linear in `names` according to a `quantization_config`. Raises InputError when it has none."""
