"""What a notebook holds in its hand: one chapter of a study, with its computation, frames, numbers and figures."""
from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from dpkit import data, project, report, stages
from dpkit.progress import observer
from dpkit.stages import Entry, Plan, Study
from dpkit.store import Store


class Chapter:
    """One chapter (a name of ``stages.CHAPTERS``, or ``verdicts``, which needs them all) of a study.

    profile: where settings come from; overrides and named parameters change some (a named parameter that is None does not).
    store: folder of artifacts; share: ``i/n``, to make only that part; out: folder for figures, frames and numbers (None:
    nothing is written). Raises ``ValueError`` with one line on anything unknown or out of range.
    """

    def __init__(self, name: str, profile: str = "smoke", overrides: Mapping[str, Any] | None = None, *,
                 store: str | Path | None = None, share: str = "1/1", out: str | Path | None = None, device: str = "auto",
                 workers: int = 0, **named: Any):
        changes = dict(overrides or {}) | {k: v for k, v in named.items() if v is not None}
        self.name, self.profile, self.share, self.device, self.workers = name, profile, share, device, workers
        self.study: Study = stages.load_study(profile, changes)
        stages.parse_share(share)
        self.data_root = project.data_folder()
        self.dataset = data.load(self.study.data, self.data_root)
        self.plan = Plan(self.study, self.dataset.identity)
        self.store = Store(store or project.store_folder())
        self.out = Path(out) if out else None

    # --- computing ----------------------------------------------------------------------------------------------------
    @property
    def parts(self) -> tuple[str, ...]:
        """The chapters of the plan that this one needs."""
        return stages.CHAPTERS if self.name == "verdicts" else (self.name,)

    def compute(self) -> None:
        """Make what is missing. Raises ``RuntimeError`` after everything else is done if a unit ended in an error."""
        units = [unit for part in self.parts for unit in self.plan.share(part, self.share)]
        found = stages.compute(self.store, units, device=self.device, workers=self.workers, data_root=self.data_root,
                               observe=observer(self.name))
        if found.errors:
            first = next(iter(found.errors.values()))
            raise RuntimeError(f"{len(found.errors)} of {self.name}'s units ended in an error, the first: {first}; the full "
                               f"text is in {self.store.root / 'errors'}; the next call tries again")

    # --- reading ------------------------------------------------------------------------------------------------------
    def rows(self, part: str | None = None) -> list[tuple[dict[str, Any], str]]:
        """(place, key) of each entry of a chapter."""
        entries: list[Entry] = getattr(self.plan, part or self.name)()
        return [(entry.place, entry.unit.key) for entry in entries]

    def frame(self, part: str | None = None) -> pd.DataFrame:
        """One row a measured thing; see :func:`dpkit.report.frame`."""
        entries: list[Entry] = getattr(self.plan, part or self.name)()
        return report.frame(self.store, [(e.place, e.unit.key) for e in entries], entries[0].unit.stage if entries else "")

    def curves(self, *names: str, part: str | None = None) -> pd.DataFrame:
        """One row a point of the curves ``names``."""
        return report.curves(self.store, self.rows(part), names)

    def tensors(self, part: str | None = None) -> list[tuple[dict[str, Any], dict]]:
        """(place, tensors) of each entry that has a result."""
        return [(place, self.store.get(key).tensors) for place, key in self.rows(part)
                if self.store.has(key) and not self.store.get(key).failed]

    @cached_property
    def numbers(self) -> dict[str, report.Number]:
        """All numbers of the study that can be computed from the store, by name."""
        parts = {part: self.rows(part) for part in stages.FRAMES}
        return {n.name: n for n in report.all_numbers(self.store, parts)}

    def number(self, name: str) -> str:
        """A number as text, with interval and n; ``not measured`` when there is none."""
        found = self.numbers.get(name)
        return report.number_text(found.record()) if found else "not measured"

    @property
    def highest(self) -> int:
        """The highest measured sparsity in whole percent."""
        return self.plan.percent(max(self.study.at_rounds))

    def verdicts(self) -> list[dict[str, Any]]:
        """A record a claim, from ``book/claims.yml``."""
        claims = report.read_claims(project.root() / "book" / "claims.yml")
        return report.verdicts(claims, list(self.numbers.values()), self.highest)

    def table(self, *prefixes: str) -> pd.DataFrame:
        """The numbers whose names begin so, as text: number, value with interval, n, key to follow with `dpkit lineage`."""
        rows = [(n.name, report.number_text(n.record(), "value"), report.number_text(n.record(), "interval"), n.n, n.key[:12])
                for n in self.numbers.values() if n.name.startswith(tuple(prefixes))]
        return pd.DataFrame(rows, columns=["number", "value", "95% interval", "n", "key"]).set_index("number")

    # --- showing ------------------------------------------------------------------------------------------------------
    def show(self, figure, name: str, table: pd.DataFrame | None = None, alt: str = ""):
        """Show a figure; with ``out``, also write it (PNG) and the frame behind it (CSV)."""
        from IPython.display import Image

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        if self.out is not None:
            folder = self.out / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.png").write_bytes(buffer.getvalue())
            if table is not None:
                table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        return Image(buffer.getvalue(), width=int(figure.get_figwidth() * 100), alt=alt or name.replace("-", " "))

    def write(self) -> None:
        """With ``out``: write ``numbers.jsonl`` and ``verdicts.json``, which the book's text reads (a share writes nothing)."""
        if self.out is None or self.share != "1/1":
            return
        self.out.mkdir(parents=True, exist_ok=True)
        files = {"numbers.jsonl": "".join(n.json() + "\n" for n in self.numbers.values()),
                 "verdicts.json": json.dumps(self.verdicts(), indent=1)}
        for name, text in files.items():
            temporary = self.out / f".{name}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)

    def describe(self) -> pd.DataFrame:
        """What this chapter was run with, for its last cell."""
        machine = {json.dumps(self.store.get(key).meta["machine"], sort_keys=True) for part in self.parts
                   for _, key in self.rows(part) if self.store.has(key)}
        machines = [json.loads(m) for m in sorted(machine)]
        keys = {key for part in self.parts for entry in self.plan.chapter(part)
                for key in stages.closure([entry.unit]) if self.store.has(key)}
        seconds = sum(report.spent(self.store.get(key)) for key in keys)
        rows = {"data": self.dataset.description, "network": f"{self.study.arch}, width {self.study.width}",
                "profile": project.profile_name(self.profile), "share": self.share, "artifacts": str(len(keys)),
                "computing time": f"{seconds:,.0f} seconds of one core (or of the GPU)",
                "machine": "; ".join(sorted({f"{m['accelerator'] or m['processor']}, {m['cores']} cores" for m in machines})),
                "software": "; ".join(sorted({f"torch {m['torch']}, Python {m['python']}" for m in machines})),
                "commit": ", ".join(sorted({m["commit"] for m in machines}))}
        return pd.DataFrame({"": rows})
