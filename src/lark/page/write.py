"""Writes report.html: the template filled with what was gathered, and plotly.min.js beside it."""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from lark.common.cache import atomic_write, file_hash, write_text
from lark.common.log import logger
from lark.comparison import tables
from lark.comparison.conclusions import list_conclusions
from lark.comparison.summaries import read_summaries
from lark.page import arm_plots, diagnostic_plots, pool_plots
from lark.page.contents import Contents, Diagnosis, GroupContents, PoolContents, gather
from lark.page.plots import Look, Plot, looks_of
from lark.page.trajectories import pack

NAME = "report.html"
PLOTLY = "plotly.min.js"
SCRIPTS = ("page.js", "plots.js", "trajectories.js")
"""Share one scope, in which `start` runs last."""
SEVERAL_DIAGNOSES = 3  # shown of a task and model

_UNENCODABLE = re.compile("[\x00\ud800-\udfff]")  # HTML has no null and UTF-8 no half of a surrogate pair
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Cell:
    text: str
    value: float | None
    """What the table is sorted by; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table. look: of each row, the class of its colour in the plots."""

    caption: str
    header: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]


@dataclass(frozen=True, kw_only=True)
class Section:
    key: str
    title: str
    sheets: list[Sheet]
    notes: list[str]
    plots: list[Plot]
    readings: Sequence[str] = ()
    """Sentences before all else."""


def write_page(summaries: Sequence[Mapping[str, Any]], path: Path, *, shared: Path | None = None) -> Path:
    """Write the page of runs, whose summaries `read_summaries` has read; returns `path`.

    shared: the folder that holds plotly.min.js for several pages; by default the page's own.
    """
    path = path.absolute()
    library = (shared or path.parent).absolute() / PLOTLY
    contents = gather(summaries)
    write_text(path, render(contents, path=path, plotly=os.path.relpath(library, path.parent)))
    _put_plotly(library)
    return path


def write_own_page(folder: Path) -> Path | None:
    """Write the page of a run or a sweep into its folder; pages of a sweep's runs share the sweep's plotly.min.js.

    A page that cannot be written (a full disk) is a warning and None: the run is over and did not fail.
    """
    in_sweep = (folder.parent / "multirun.yaml").is_file()  # Hydra's
    try:
        return write_page(read_summaries([folder]), folder / NAME, shared=folder.parent if in_sweep else None)
    except OSError as error:
        logger.warning(
            "%s could not be written (%s); write it with python -m lark.report %s --page <file>",
            folder / NAME,
            error.strerror,
            folder,
        )
        return None


def render(contents: Contents, *, path: Path, plotly: str = PLOTLY) -> str:
    """The page's HTML, for a page at `path` with the library at `plotly`, relative to it."""
    own = resources.files("lark.page")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    early = (own / "theme.js").read_text(encoding="utf-8")
    parts = "\n".join((own / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\nstart();\n}})();\n'
    printed = list(tables.build_tables(contents.comparison))
    sections = [section for group in contents.groups for section in _sections(group, _own(printed, group, contents))]
    pools = [pool for group in contents.groups for pool in group.pools]
    heads, packed = pack(pools)
    plots = {f"{section.key}-{plot.key}": _embedded(plot) for section in sections for plot in section.plots}
    text = environment.from_string((own / "report.html.jinja").read_text(encoding="utf-8")).render(
        title=_title(contents),
        counts=_counts(contents),
        sections=sections,
        grid=_sheet(printed[-1], f"Over tasks, students and evaluation sets: {printed[-1].title}")
        if contents.comparison.grid and len(contents.groups) > 1
        else None,
        legend=tables.LEGEND,
        runs=[asdict(run) | {"page": _link(run.folder, path)} for run in contents.runs],
        pools=heads,
        without_pools=_without_pools(contents, pools),
        style=Markup((own / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        early=Markup(early),
        hashes=[_source(code) for code in (script, early)],
        data=htmlsafe_json_dumps({"plots": plots, "plotly": plotly}, allow_nan=False),
        packed=packed,
    )
    return _UNENCODABLE.sub("\ufffd", text)


def _source(code: str) -> str:
    """By which the page's policy lets its own scripts run, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _put_plotly(path: Path) -> None:
    source = resources.files("plotly") / "package_data" / PLOTLY
    with resources.as_file(source) as own:
        if path.is_file() and file_hash(path) == file_hash(own):
            return
        with atomic_write(path) as temporary:
            temporary.write_bytes(own.read_bytes())


def _title(contents: Contents) -> str:
    names = list(dict.fromkeys(f"{group.task} · {group.model}" for group in contents.groups))
    return names[0] if len(names) == 1 else f"{len(names)} tasks and students" if names else "runs"


def _counts(contents: Contents) -> str:
    comparison = contents.comparison
    parts = [f"{comparison.runs} finished run{_s(comparison.runs)}"]
    parts += [f"{len(comparison.stopped)} stopped early, as told"] if comparison.stopped else []
    parts += [f"{len(comparison.failed)} failed"] if comparison.failed else []
    arms = sum(len(group.curves) for group in contents.groups)
    seeds = {seed for group in contents.groups for by_seed in group.curves.values() for seed in by_seed}
    if arms:
        parts += [f"{arms} kind{_s(arms)} of trained student", f"{len(seeds)} seed{_s(len(seeds))}"]
    return ", ".join(parts)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _link(folder: str, page: Path) -> str | None:
    """To another page, of a run; None if there is none but this."""
    other = (Path(folder) / NAME).absolute()
    return os.path.relpath(other, page.parent) if other != page and other.is_file() else None


def _without_pools(contents: Contents, pools: Sequence[PoolContents]) -> str:
    if pools:
        return ""
    if not contents.groups:
        return "No run came as far as its pool."
    return "No run left candidates.jsonl.gz, as an older version wrote them; run them again to see their candidates."


def _own(printed: Sequence[tables.TextTable], group: GroupContents, contents: Contents) -> Sequence[tables.TextTable]:
    """The group's sheets of those of the comparison: its arms and their differences; none if nothing was compared."""
    if group.compared is None:
        return ()
    number = contents.comparison.groups.index(group.compared)
    return printed[2 * number : 2 * number + 2]


def _sections(group: GroupContents, printed: Sequence[tables.TextTable]) -> list[Section]:
    key = re.sub(r"[^a-z0-9]+", "-", f"{group.task}-{group.model}".lower()).strip("-") or "runs"
    key += f"-{hashlib.sha256(f'{group.task}|{group.model}'.encode()).hexdigest()[:6]}"
    looks = looks_of(list(group.curves))
    plots = [] if group.compared is None else [arm_plots.differences(group.compared)]
    plots += [arm_plots.loss_curves(group.curves, looks), arm_plots.teacher_shares(group.teacher_shares)]
    first = Section(
        key=key,
        title=f"{group.task} · {group.model}",
        sheets=_sheets(group, printed, looks),
        notes=[*(tables.list_notes(group.compared) if group.compared else ()), *group.left_out],
        plots=plots,
        readings=[] if group.compared is None else list(list_conclusions(group.compared)),
    )
    rest = [_pool_section(f"{key}-pool{i}", pool, group, looks) for i, pool in enumerate(group.pools)]
    shown = group.diagnoses[:SEVERAL_DIAGNOSES] or (None,)
    for number, diagnosis in enumerate(shown):
        rest.append(_diagnosis_section(f"{key}-diagnosis{number}", diagnosis, group))
    return [first, *rest]


def _pool_section(key: str, pool: PoolContents, group: GroupContents, looks: Mapping[str, Look]) -> Section:
    facts = pool.sample.facts
    whole = facts["trajectories"] == facts["of_trajectories"]
    shown = f"{facts['problems']:,} of {facts['of_problems']:,} problems"
    note = (
        f"All {facts['trajectories']:,} candidates of {facts['problems']:,} problems."
        if whole
        else f"From a sample, chosen by the hash of their ids, of {shown}, with {facts['trajectories']:,} of "
        f"{facts['of_trajectories']:,} candidates."
    )
    plots = [
        pool_plots.weights(pool, looks, group.effective),
        pool_plots.scores_by_teacher(pool),
        pool_plots.overlaps(pool),
    ]
    return Section(key=key, title=f"{pool.name}: choices", sheets=[], notes=[note], plots=plots)


def _diagnosis_section(key: str, diagnosis: Diagnosis | None, group: GroupContents) -> Section:
    title = f"{group.task} · {group.model}: does the score mean anything?"
    notes = []
    if diagnosis is None:
        notes.append("The runs have no diagnostics.json.")
    else:
        notes.append(f"From the run of {diagnosis.label} with seed {diagnosis.seed}.")
        if len(group.diagnoses) > SEVERAL_DIAGNOSES:
            more = ", ".join(one.label for one in group.diagnoses[SEVERAL_DIAGNOSES:])
            notes.append(f"Not shown here, but on the runs' own pages: {more}.")
    plots = [
        *diagnostic_plots.true_loss_drop(diagnosis),
        *diagnostic_plots.correlations(diagnosis),
        diagnostic_plots.bins(diagnosis),
    ]
    return Section(key=key, title=title, sheets=[], notes=notes, plots=plots)


def _embedded(plot: Plot) -> dict[str, Any] | None:
    return plot.figure and {"figure": plot.figure, "remarks": [remark for _, remark in plot.choices]}


def _sheets(group: GroupContents, printed: Sequence[tables.TextTable], looks: Mapping[str, Look]) -> list[Sheet]:
    if group.compared is None:
        return []
    arms, pairs = printed
    of_rows = [looks[arm.label].name if arm.label in looks else "" for arm in group.compared.arms]
    return [
        _sheet(arms, "Students: one row for each kind, means over seeds", of_rows),
        *([_sheet(pairs, "Differences: selector minus baseline")] if pairs.labels else []),
    ]


def _sheet(sheet: tables.TextTable, caption: str, looks: Sequence[str] = ()) -> Sheet:
    rows = zip(sheet.labels, looks or [""] * len(sheet.labels), *(cells for _, cells in sheet.columns), strict=True)
    return Sheet(
        caption=caption,
        header=sheet.header,
        columns=[header for header, _ in sheet.columns],
        rows=[
            (label, look, [Cell(text=text.strip(), value=sorted_by(text)) for text in cells])
            for label, look, *cells in rows
        ],
    )


def sorted_by(text: str) -> float | None:
    """The number that a cell's text begins with; below what it says where that is an upper bound."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    value = float(found[0].replace(",", ""))
    return value / 2 if text.lstrip().startswith("<") else value
