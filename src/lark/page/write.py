"""Write report.html: the template filled with what was gathered, and plotly.min.js beside it."""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from lark.common.cache import atomic_write, file_hash, write_text
from lark.common.log import logger
from lark.comparison.summaries import read_summaries
from lark.comparison.tables import LEGEND, TextTable, build_tables, list_notes
from lark.page.arm_plots import plot_differences, plot_loss_curves, plot_teacher_shares
from lark.page.contents import Contents, GroupContents, gather
from lark.page.diagnostic_plots import list_diagnostic_plots
from lark.page.disagreements import Disagreement
from lark.page.headline import list_headline
from lark.page.plots import Look, Plot, assign_looks
from lark.page.pool_plots import plot_overlaps, plot_scores_by_teacher, plot_weights
from lark.page.trajectories import pack

NAME = "report.html"
PLOTLY = "plotly.min.js"
SCRIPTS = ("page.js", "plots.js", "trajectories.js")
"""Share one scope, in which `start` runs last."""
DIAGNOSES_SHOWN = 3  # of a task and model

_UNENCODABLE = re.compile("[\x00\ud800-\udfff]")  # HTML has no null and UTF-8 no half of a surrogate pair
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Hold one section of the page. key: the beginning of its ids."""

    key: str
    title: str
    plots: Sequence[Plot]
    headline: Sequence[tuple[str, str]] = ()
    """What is asked first, with its answer in a sentence."""
    tables: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    disagreements: Sequence[Disagreement] = ()

    @property
    def missing(self) -> dict[str, list[str]]:
        """Group the titles of plots that could not be drawn by the reason."""
        titles: dict[str, list[str]] = {}
        for plot in self.plots:
            if plot.missing:
                titles.setdefault(plot.missing, []).append(plot.title)
        return titles


def write_page(summaries: Sequence[Mapping[str, Any]], path: Path, *, library: Path | None = None) -> Path:
    """Write the page of runs, whose summaries `read_summaries` has read; returns `path`.

    library: the folder that holds plotly.min.js for several pages; by default the page's own.
    """
    path = path.absolute()
    plotly = (library or path.parent).absolute() / PLOTLY
    write_text(path, _render(gather(summaries), path=path, plotly=os.path.relpath(plotly, path.parent)))
    with resources.as_file(resources.files("plotly") / "package_data" / PLOTLY) as own:
        if not plotly.is_file() or file_hash(plotly) != file_hash(own):
            with atomic_write(plotly) as temporary:
                temporary.write_bytes(own.read_bytes())
    return path


def write_own_page(folder: Path, logs: Path) -> Path | None:
    """Write the page of a run or a sweep into its folder; plotly.min.js lies once in `logs`, for all of them.

    A page that cannot be written (a full disk) is a warning and None: the run is over and did not fail.
    """
    try:
        return write_page(read_summaries([folder]), folder / NAME, library=logs)
    except OSError as error:
        remedy = f"make room, then python -m lark.report {folder} --page {folder / NAME}"
        logger.warning("%s could not be written (%s): %s", folder / NAME, error.strerror, remedy)
        return None


def _render(contents: Contents, *, path: Path, plotly: str) -> str:
    """Render the HTML for a page at `path`; plotly: where its library is, relative to it."""
    own = resources.files("lark.page")
    texts = {name: (own / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "theme.js", "style.css")}
    scripts = "\n".join(texts[name] for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{scripts}\nstart();\n}})();\n'
    tables = list(build_tables(contents.comparison))
    groups = {(group.task, group.model): number for number, group in enumerate(contents.comparison.groups)}
    sections = []
    for group in contents.groups:
        number = groups.get((group.task, group.model))
        sections += _make_sections(group, [] if number is None else tables[2 * number : 2 * number + 2])
    over = contents.comparison.grid and len(contents.groups) > 1
    grid = _make_table(tables[-1], f"Over tasks, students and evaluation sets: {tables[-1].title}") if over else None
    pools = [pool for group in contents.groups for pool in group.pools]
    heads, packed = pack(pools)
    plots = {
        f"{section.key}-{plot.key}": plot.figure
        and {"figure": plot.figure, "remarks": [remark for _, remark in plot.choices]}
        for section in sections
        for plot in section.plots
    }
    names = list(dict.fromkeys(group.title for group in contents.groups))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = lambda text: _CONTROL.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)
    text = environment.from_string((own / "report.html.jinja").read_text(encoding="utf-8")).render(
        title=names[0] if len(names) == 1 else f"{len(names)} tasks and students" if names else "runs",
        counts=_describe_counts(contents),
        sections=sections,
        grid=grid,
        legend=LEGEND,
        runs=[{**run, **_link_run(Path(run["folder"]), path)} for run in contents.runs],
        pools=heads,
        any_group=bool(contents.groups),
        style=Markup(texts["style.css"]),
        script=Markup(script),
        early=Markup(texts["theme.js"]),
        hashes=[_hash_script(code) for code in (script, texts["theme.js"])],
        data=htmlsafe_json_dumps({"plots": plots, "plotly": plotly}, allow_nan=False),
        packed=packed,
    )
    return _UNENCODABLE.sub("\ufffd", text)


def _hash_script(code: str) -> str:
    """Hash a script, so that the page's policy lets it run, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def _describe_counts(contents: Contents) -> str:
    comparison = contents.comparison
    arms = sum(len(group.curves) for group in contents.groups)
    seeds = {seed for group in contents.groups for by_seed in group.curves.values() for seed in by_seed}
    parts = [f"{comparison.runs} finished run{'' if comparison.runs == 1 else 's'}"]
    parts += [f"{len(comparison.stopped)} stopped early, as told"] if comparison.stopped else []
    parts += [f"{len(comparison.failed)} failed"] if comparison.failed else []
    if arms:
        parts.append(f"{arms} kind{'' if arms == 1 else 's'} of trained student")
        parts.append(f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}")
    return ", ".join(parts)


def _link_run(folder: Path, page: Path) -> dict[str, Any]:
    """List links to a run's folder and to what is in it, by name, relative to the page."""
    files = {"page": NAME, "selection": "selector/selection.jsonl", "summary": "summary.json", "log": "run.log"}
    found = {name: (folder / file).absolute() for name, file in files.items()}
    links = {
        name: os.path.relpath(path, page.parent) for name, path in found.items() if path != page and path.is_file()
    }
    return {"href": os.path.relpath(folder.absolute(), page.parent), "links": links}


def _make_sections(group: GroupContents, tables: Sequence[TextTable]) -> list[Section]:
    """Make the group's sections. tables: of its arms and their differences; none if nothing was compared."""
    key = re.sub(r"[^a-z0-9]+", "-", f"{group.task}-{group.model}".lower()).strip("-") or "runs"
    key += f"-{hashlib.sha256(f'{group.task}|{group.model}'.encode()).hexdigest()[:6]}"
    looks = assign_looks(list(group.curves))
    plots = [plot_loss_curves(group.curves, looks), plot_teacher_shares(group.teacher_shares)]
    headline = list(list_headline(group))
    if group.compared is None:
        first = Section(key=key, title=group.title, headline=headline, plots=plots, notes=group.left_out)
    else:
        arms, pairs = tables
        of_rows = [looks[arm.label].name if arm.label in looks else "" for arm in group.compared.arms]
        first = Section(
            key=key,
            title=group.title,
            headline=headline,
            tables=[
                _make_table(arms, "Students: one row for each kind, means over seeds", of_rows),
                *([_make_table(pairs, "Differences: selector minus baseline")] if pairs.labels else []),
            ],
            notes=[*list_notes(group.compared), *group.left_out],
            plots=[plot_differences(group.compared), *plots],
            disagreements=group.disagreements,
        )
    return [first, *_make_pool_sections(key, group, looks), *_make_diagnosis_sections(key, group)]


def _make_pool_sections(key: str, group: GroupContents, looks: Mapping[str, Look]) -> list[Section]:
    return [
        Section(
            key=f"{key}-pool{number}",
            title=f"{pool.name}: choices",
            plots=[plot_weights(pool, looks), plot_scores_by_teacher(pool), plot_overlaps(pool)],
        )
        for number, pool in enumerate(group.pools)
    ]


def _make_diagnosis_sections(key: str, group: GroupContents) -> list[Section]:
    sections = []
    for number, diagnosis in enumerate(group.diagnoses[:DIAGNOSES_SHOWN]):
        notes = [f"From the run of {diagnosis.label} with seed {diagnosis.seed}."]
        if more := [one.label for one in group.diagnoses[DIAGNOSES_SHOWN:]]:
            notes.append(f"Not shown here, but on the runs' own pages: {', '.join(more)}.")
        title = f"{group.title}: does the score mean anything?"
        plots = list_diagnostic_plots(diagnosis)
        sections.append(Section(key=f"{key}-diagnosis{number}", title=title, notes=notes, plots=plots))
    return sections


def _make_table(table: TextTable, caption: str, looks: Sequence[str] = ()) -> dict[str, Any]:
    """Make a table of the template: caption, header, columns, and rows of label, class of its colour and cells."""
    columns = table.list_columns()
    rows = zip(table.labels, looks or [""] * len(table.labels), *(cells for _, cells, _ in columns), strict=True)
    more = ["" if is_shown else "more" for _, _, is_shown in columns]
    return {
        "caption": caption,
        "header": table.header,
        "columns": [(header, of_column) for (header, _, _), of_column in zip(columns, more, strict=True)],
        "rows": [
            (
                label,
                look,
                [
                    {"text": text.strip(), "value": parse_number(text), "more": of_column}
                    for text, of_column in zip(cells, more, strict=True)
                ],
            )
            for label, look, *cells in rows
        ],
    }


def parse_number(text: str) -> float | None:
    """Parse the number that a cell's text begins with, to sort by; below what it says where that is an upper bound."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    value = float(found[0].replace(",", ""))
    return value / 2 if text.lstrip().startswith("<") else value
