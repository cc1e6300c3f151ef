"""What became of every parameter of a model: the tensors of a checkpoint by the rule that decided about them, and their sum.

A tensor counts once. What no rule explains does not exist here: whoever makes an `Account` names a rule for each tensor, and says how many
parameters the model has, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

QUANTIZED, SKIPPED, KEPT, DENSE, EXTRA = "quantized", "skipped", "kept", "dense", "not in the model"
STATES = (QUANTIZED, SKIPPED, KEPT, DENSE, EXTRA)
"""DENSE: in a model that nobody has quantized. EXTRA: in the checkpoint, but no parameter of the model: buffers, and parts that
transformers does not build."""

BUFFER = "buffer"
SECOND_COPY = "second copy of a tied weight"
NOT_A_PARAMETER = "not a parameter of the model"
OUTSIDE_MODEL = (BUFFER, SECOND_COPY, NOT_A_PARAMETER)
"""The rules of EXTRA tensors that are copied."""
UNTIED_HEAD = "output head beside the embedding it was tied to"
"""How the rule of an EXTRA tensor begins that the run adds."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor (for a quantized linear: its weight). `before` is None where the original is not known."""

    state: str
    rule: str
    parameters: int
    before: int | None
    after: int


@dataclass(frozen=True, slots=True)
class AccountRow:
    """All tensors of one state and rule. Sizes in bytes; `share` is the part of the model's parameters, None outside the model."""

    state: str
    rule: str
    tensors: int
    parameters: int
    before: int | None
    after: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Account:
    """The rows, quantized ones first and large before small, and their sum; `parameters` counts those of the model, tied ones once.

    >>> account = Account.of([Entry("kept", "norm", 10, 20, 20), Entry("quantized", "4 bits", 90, 180, 47)])
    >>> [(row.rule, row.share) for row in account.rows], account.parameters, account.before, account.after
    ([('4 bits', 0.9), ('norm', 0.1)], 100, 200, 67)
    """

    rows: tuple[AccountRow, ...]
    parameters: int
    before: int | None
    after: int

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Account:
        rows: dict[tuple[str, str], AccountRow] = {}
        for entry in entries:
            key = (entry.state, entry.rule)
            row = rows.get(key, AccountRow(entry.state, entry.rule, 0, 0, 0, 0, None))
            rows[key] = replace(
                row,
                tensors=row.tensors + 1,
                parameters=row.parameters + entry.parameters,
                before=_sum([row.before, entry.before]),
                after=row.after + entry.after,
            )
        parameters = sum(row.parameters for row in rows.values() if row.state != EXTRA)
        shared = [replace(row, share=None if row.state == EXTRA else row.parameters / max(parameters, 1)) for row in rows.values()]
        shared.sort(key=lambda row: (STATES.index(row.state), -row.parameters, row.rule))
        return cls(tuple(shared), parameters, _sum([row.before for row in shared]), sum(row.after for row in shared))

    def to_dict(self) -> dict[str, Any]:
        rows = [{name: getattr(row, name) for name in AccountRow.__dataclass_fields__} for row in self.rows]
        return {"rows": rows, "parameters": self.parameters, "before": self.before, "after": self.after}


def spec_rule(bits: int, group_size: int, *, sym: bool) -> str:
    """A spec as the rule of a quantized linear.

    >>> spec_rule(4, 128, sym=True), spec_rule(8, -1, sym=False)
    ('4 bits, groups of 128', '8 bits, one group per row, asymmetric')
    """
    groups = "one group per row" if group_size == -1 else f"groups of {group_size}"
    return f"{bits} bits, {groups}{'' if sym else ', asymmetric'}"


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
