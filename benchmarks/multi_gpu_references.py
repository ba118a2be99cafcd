"""What one GPU gives of each row of multi_gpu.py, made by all processes beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multi_gpu_cases import Case, course_of


@dataclass(frozen=True)
class References:
    """What one GPU gives of each row, in a file each: facts, the output, and what rounding does to
    it; or why it failed."""

    folder: Path

    def begin(self) -> None:
        """Forget what processes before these have begun, and what failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for claim in self.folder.glob("*.claim"):
            claim.unlink()
        for path in self.folder.glob("*.pt"):
            if "failed" in torch.load(path):
                path.unlink()

    def path(self, case: Case, row: str) -> Path:
        name = f"{case.model.name} {case.dtype} {row}"
        return self.folder / (
            "".join(c if c.isalnum() or c in ".@+" else "-" for c in name) + ".pt"
        )

    def claim(self, case: Case, row: str) -> bool:
        """Whether this process is the one that makes it."""
        path = self.path(case, row)
        try:
            path.with_suffix(".claim").touch(exist_ok=False)
        except FileExistsError:
            return False
        return not path.exists()

    def write(self, case: Case, row: str, found: dict[str, Any]) -> None:
        path = self.path(case, row)
        torch.save(found, part := path.with_suffix(".part"))
        part.replace(path)

    def read(self, case: Case, row: str) -> dict[str, Any] | None:
        path = self.path(case, row)
        return torch.load(path) if path.exists() else None


def dearest_first(rows: list[str]) -> list[str]:
    """So that no process is left with a long row at the end."""

    def cost(name: str) -> int:
        row, _ = course_of(name, 1)
        return 3 * (row.method is None) + 2 * len(row.kinds()) + ("compile" in row.added)

    return sorted(rows, key=cost, reverse=True)
