"""What a notebook holds in its hand: one chapter of a study, with its computation, frames, numbers and figures."""
from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dpkit import data, distill, project, report, stages
from dpkit.progress import observer
from dpkit.report.tables import Whole
from dpkit.stages import Entry, Plan, Study
from dpkit.store import Artifact, Store


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

    # --- small sets ---------------------------------------------------------------------------------------------------
    def small_set(self, name: str, seed: int = 0) -> Artifact | None:
        """The small set ``name`` as one seed has it; None where the study has none, it is not made yet, or it failed."""
        if name not in self.study.sets:
            return None
        key = self.plan.small_set(name, seed).key
        return self.store.get(key) if self.store.has(key) and not self.store.get(key).failed else None

    def set_rows(self) -> list[tuple[dict[str, Any], str]]:
        """(place, key) of each small set, once for each time that it is made."""
        rows: dict[tuple[str, str], int] = {}
        for name in self.study.sets:
            for seed in range(self.study.evaluation_seeds):
                rows.setdefault((name, self.plan.small_set(name, seed).key), seed)
        return [({"set": name, "seed": seed}, key) for (name, key), seed in rows.items()]

    def asked(self) -> dict[str, distill.MethodSpec]:
        """What each small set of the study was asked for, by name; what others published is left out."""
        specs = {name: self.plan.small_set(name, 0).spec["distill"] for name in self.study.sets}
        return {name: distill.spec_of(spec) for name, spec in specs.items() if spec["method"] in distill.METHODS}

    def pictures(self, name: str, what: str = "images", classes: int = 0, count: int = 0) -> np.ndarray | None:
        """Stored images of a set, (classes * count, H, W, 3) float in [0, 1], class after class; None where there are none.

        what: ``images``, or ``before``, what a learned set started from. classes, count: how many, evenly spaced classes and the
        first images of each (0: all). Values outside [0, 1] are cut; whitened images are stretched to it.
        """
        found = self.small_set(name)
        if found is None or what not in found.tensors:
            return None
        images, labels = found.tensors[what].float(), found.tensors["labels"]
        labels = labels.argmax(1) if labels.dim() == 2 else labels  # others publish soft ones
        total = self.dataset.classes
        chosen = [i * total // classes for i in range(min(classes, total))] if classes else range(total)
        places = [(labels == c).nonzero()[:, 0] for c in chosen]
        each = min([len(p) for p in places] + ([count] if count else []))
        shown = images[torch.cat([p[:each] for p in places])]
        if found.result["recipe"].get("space") == "whitened":
            low, high = np.quantile(shown.numpy(), (0.01, 0.99))
            shown = (shown - low) / max(float(high - low), 1e-6)
        pixels = shown.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels

    # --- numbers ------------------------------------------------------------------------------------------------------
    @cached_property
    def numbers(self) -> dict[str, report.Number]:
        """All numbers of the study that can be computed from the store, by name."""
        parts = {part: self.rows(part) for part in stages.FRAMES}
        return {n.name: n for n in report.all_numbers(self.store, parts)}

    def number(self, name: str) -> str:
        """A number as text, with interval and n; ``not measured`` when there is none."""
        found = self.numbers.get(name)
        return report.number_text(found.record()) if found else "not measured"

    def sign(self, name: str) -> str:
        """What the interval of a difference says: ``higher``, ``lower``, ``not decided`` (it holds zero, or there is none as n is
        1), or ``not measured``."""
        found = self.numbers.get(name)
        if found is None:
            return "not measured"
        if found.low is None or found.low <= 0 <= found.high:
            return "not decided"
        return "higher" if found.low > 0 else "lower"

    @property
    def highest(self) -> int:
        """The highest measured sparsity in whole percent."""
        return self.plan.percent(max(self.study.at_rounds))

    @property
    def looked(self) -> int:
        """The sparsity at which landscapes are measured, in whole percent."""
        return self.plan.percent(self.study.plane_round or max(self.study.at_rounds))

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

        from dpkit.report.figures import png

        picture = png(figure)
        if self.out is not None:
            folder = self.out / "figures"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.png").write_bytes(picture)
            if table is not None:
                table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        return Image(picture, width=int(figure.get_figwidth() * 100), alt=alt or name.replace("-", " "))

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

    def describe(self) -> Whole:
        """What this chapter was run with, for its last cell: a table that shows itself whole."""
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
        return Whole(pd.DataFrame({"": rows}))
