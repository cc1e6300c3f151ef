"""QuantLinear: the single module that multiplies with a quantized weight at run time.

Two sets of tensors live in it:

    checkpoint tensors   Parameters under their names in the file (qweight, qzeros, scales, g_idx; weight_packed, weight_scale, ...), in
                         the file's own dtypes, never trained. Loaders fill them, `state_dict` returns them, so that saving writes back
                         the bytes that were read. They keep their dtype when the module is cast: scales are part of the format.
    kernel state         non-persistent buffers `prepared_*`, made by `prepare()` once the checkpoint tensors are there.

Most of the state is not a second copy: whatever a kernel prepares that equals a checkpoint tensor, or its transpose, becomes a view of
that tensor. The `torch` backend thus costs nothing but asymmetric zero points (a byte a group) on top of the checkpoint; the `cpu`
backend adds its own arrangement of the codes.

The choice of a kernel depends on device and dtype, so moving or casting the module prepares it anew. Copies and pickles carry the
checkpoint tensors alone and prepare again. Tensors that accelerate offloads are prepared for one call and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats.protocol import Format
from gptqkit.kernels.dispatch import choose
from gptqkit.kernels.protocol import Kernel, Request

_STATE = "prepared_"
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantLinear(nn.Module):
    """y = x @ weight.T + bias with a quantized weight: [..., I] -> [..., O].

    tensors   the checkpoint's tensors by local name, real or on the meta device (then `prepare` once they are loaded)
    bias      [O] Parameter or None; ordinary, in the model's dtype
    dtype     of activations and result; an input of another dtype is cast, and the result cast back
    backend   forces a kernel; None takes the first that accepts
    name      of the linear in the model, for messages
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: Format,
        spec: LinearSpec,
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        backend: str | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.spec = format, spec
        self.dtype, self.backend, self.name = dtype, backend, name
        self.packed_names = tuple(tensors)
        self.packed_dtypes = {local: tensor.dtype for local, tensor in tensors.items()}
        for local, tensor in tensors.items():
            self.register_parameter(local, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self._kernel: Kernel | None = None
        self._request: Request | None = None

    @property
    def kernel_name(self) -> str | None:
        """The backend that was chosen; None before `prepare`."""
        return None if self._kernel is None else self._kernel.name

    @property
    def device(self) -> torch.device:
        return self._parameters[self.packed_names[0]].device  # type: ignore[union-attr]

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in canonical form, on the module's device. Raises InputError that names the linear for tensors that make no sense."""
        # Decoded on the CPU: the formats check values, and each check on a GPU would be a synchronisation.
        tensors = {local: self._parameters[local].detach().cpu() for local in self.packed_names}  # type: ignore[union-attr]
        try:
            weight = self.format.decode(tensors, self.spec)
        except InputError as error:
            raise InputError(f"{self.name}: {error}" if self.name else str(error)) from None
        if (weight.out_features, weight.in_features) != (self.out_features, self.in_features):
            raise InputError(
                f"{self.name}: the checkpoint holds a weight of {weight.out_features} x {weight.in_features}, the model has "
                f"{self.out_features} x {self.in_features}; config.json belongs to another model, or bits is wrong in it"
            )
        return _moved(weight, self.device)

    def loaded(self) -> None:
        """To be called once a loader has put real tensors in place: undoes what it may have done to them, and prepares.

        transformers marks float Parameters trainable, and widens those whose name matches a keep-in-float32 rule; narrowing gives the
        same bits back.
        """
        for local, dtype in self.packed_dtypes.items():
            parameter = self._parameters[local]
            assert parameter is not None
            if parameter.dtype == dtype:
                parameter.requires_grad_(False)
            else:
                self._parameters[local] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        self.prepare()

    def prepare(self) -> None:
        """Chooses a kernel for the present device and dtype and makes its state. Raises InputError when none accepts."""
        self._release()
        if self.device.type == "meta":
            return
        with torch.no_grad():
            weight = self.quantized_weight()
            self._request = Request.of(weight, self.dtype, bias=self.bias is not None)
            kernel = choose(self._request, self.backend, name=self.name or "this linear")
            for key, tensor in kernel.prepare(weight, self._request).items():
                self.register_buffer(_STATE + key, self._shared(tensor), persistent=False)
        self._kernel = kernel

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [O, I] on the module's device, in `dtype` (None: that of the module)."""
        return self.quantized_weight().dequantize(dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            return self._forward_once(x)
        assert self._request is not None
        x_MI = x.reshape(-1, self.in_features).to(self.dtype)
        bias = self._parameters["bias"]
        bias_O = None if bias is None else bias.to(self.dtype)
        state = {key.removeprefix(_STATE): tensor for key, tensor in self._buffers.items() if tensor is not None}
        y_MO = self._kernel.matmul(x_MI, state, self._request, bias_O)
        return y_MO.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={spec.bits}, "
            f"group_size={spec.group_size}, sym={spec.sym}, format={self.format.name}, backend={self.kernel_name}"
        )

    def _forward_once(self, x: Tensor) -> Tensor:
        """Without state: prepares now, and keeps it unless the checkpoint tensors are only here for this call (accelerate's offload)."""
        if self.device.type == "meta":
            raise InputError(f"{self.name or 'a QuantLinear'} has no tensors yet: load the checkpoint before calling the model")
        self.prepare()
        try:
            return self.forward(x)
        finally:
            if getattr(getattr(self, "_hf_hook", None), "offload", False):
                self._release()

    def _release(self) -> None:
        self._kernel = self._request = None
        for key in [key for key in self._buffers if key.startswith(_STATE)]:
            delattr(self, key)

    def _shared(self, tensor: Tensor) -> Tensor:
        """A view of the checkpoint tensor that holds the same values, as it is or transposed, if there is one."""
        for local in self.packed_names:
            own = self._parameters[local].detach()  # type: ignore[union-attr]
            if own.dtype != tensor.dtype or own.dim() != tensor.dim():
                continue
            for view in (own, own.t()) if own.dim() == 2 else (own,):
                if view.shape == tensor.shape and torch.equal(view, tensor):
                    return view
        return tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What .to(), .half(), .cuda() and so on call. Checkpoint tensors move but are never cast; the state follows by `prepare`."""
        was_prepared, before = self._kernel is not None, (self.device, self.dtype)
        packed = {local: self._parameters.pop(local) for local in self.packed_names}
        state = {key: self._buffers.pop(key) for key in list(self._buffers) if key.startswith(_STATE)}
        probe = fn(torch.empty(0, dtype=self.dtype, device=before[0]))
        super()._apply(fn, recurse)
        moved = {local: _without_cast(parameter, fn) for local, parameter in packed.items() if parameter is not None}
        self._parameters.update(moved)
        self._parameters["bias"] = self._parameters.pop("bias")  # last, as it was
        self.dtype = probe.dtype
        if (probe.device, probe.dtype) == before and all(moved[local].data_ptr() == packed[local].data_ptr() for local in moved):  # type: ignore[union-attr]
            self._buffers.update(state)
            return self
        self._kernel = self._request = None
        self._non_persistent_buffers_set -= set(state)
        if was_prepared:
            self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        attributes = dict(self.__dict__)
        attributes["_buffers"] = {key: tensor for key, tensor in self._buffers.items() if not key.startswith(_STATE)}
        attributes["_non_persistent_buffers_set"] = {key for key in self._non_persistent_buffers_set if not key.startswith(_STATE)}
        return {**attributes, "_kernel": None, "_request": None, "was_prepared": self._kernel is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_prepared = state.pop("was_prepared")
        super().__setstate__(state)
        if was_prepared:
            self.prepare()


def _without_cast(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """`fn` on the bits of a parameter: every dtype conversion of nn.Module leaves integers alone."""
    bits = parameter.detach()
    bits = bits.view(_AS_INTEGERS[bits.element_size()]) if bits.is_floating_point() else bits
    return nn.Parameter(fn(bits).view(parameter.dtype), requires_grad=False)


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(
        bits=weight.bits,
        group_size=weight.group_size,
        codes_OI=weight.codes_OI.to(device),
        scale_OG=weight.scale_OG.to(device),
        zero_OG=None if weight.zero_OG is None else weight.zero_OG.to(device),
        group_I=None if weight.group_I is None else weight.group_I.to(device),
    )
