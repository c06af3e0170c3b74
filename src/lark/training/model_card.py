"""The model card of a trained arm: README.md in its checkpoint and in what is exported of it.

What it says is read from the arm's files and nothing else, so it claims nothing that was not measured. Texts that come
from users (names of models, rules, teachers, sets) are escaped.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from lark.common.cache import read_json, write_text

if TYPE_CHECKING:
    from lark.training.arms import Arm
    from lark.training.datamodule import TrajectoryDataModule

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")
_TEACHERS_SHOWN = 12

_LOAD = """\
{imports}

folder = "."  # of this card
{model}
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=512)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def arm_facts(arm: "Arm", data: "TrajectoryDataModule", run: str | Path | None) -> dict[str, Any]:
    """What trained.json says so that the arm can be described and exported without its run (JSON).

    run: the folder of the run that trained it. `student` holds the arguments of `Student`, paths made absolute and the
    revision pinned to the commit that was trained.
    """
    student = data.student
    settings = {field.name: getattr(student, field.name) for field in dataclasses.fields(student)}
    for name in ("path", "template"):
        settings[name] = _absolute(settings[name])
    if settings.get("adapter"):
        settings["adapter"] = [_absolute(folder) for folder in student.adapters]
    if settings["path"] is None:
        settings["revision"] = student.identity()["revision"]
    rule = data.rules.get(arm.name)
    return {
        "rule": arm.rule,
        "score": None if rule is None else _part(rule.score),
        "filter": None if rule is None or rule.filter is None else _part(rule.filter),
        "student": settings,
        "task": data.task.name,
        "run": None if run is None else str(Path(run).absolute()),
        "identity": arm.identity,
    }


def _absolute(path: str | None) -> str | None:
    """`shipped:tiny`, `chatml` and such stay as they are."""
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path


def _part(part: Any) -> str:
    """A part of a rule in words: a column, `module:function`, or a class with its settings."""
    if isinstance(part, str):
        return part
    if dataclasses.is_dataclass(part):
        given = ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part) if field.init)
        shown = ", ".join(f"{name}={_part(value) if callable(value) else value}" for name, value in given)
        return f"{type(part).__qualname__}({shown})"
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def write_card(folder: Path, trained: Mapping[str, Any], arm_folder: Path, **how: Any) -> None:
    """README.md in `folder` of the arm in `arm_folder`, whose trained.json holds `trained`; `how`: see `card`."""
    selection = read_json(arm_folder / "selection.json")
    metrics = arm_folder / "metrics.json"
    figures = read_json(metrics) if metrics.is_file() else None
    write_text(folder / "README.md", card(trained, selection, figures, **how))


def card(
    trained: Mapping[str, Any],
    selection: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    *,
    merged: bool = False,
    weights: str | None = None,
) -> str:
    """The card as Markdown with its YAML header.

    trained, selection, metrics: the arm's JSON files; metrics is null before it is evaluated.
    merged: the LoRA adapter has been added to the base's weights.  weights: what the files beside the card
        hold, in words.
    """
    student = trained["student"]
    adapter = student["lora"] is not None and not merged
    data = ModelCardData(
        base_model=student["id"] if student["path"] is None else None,  # the hub's ids only
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lark", "data-selection", "sft", *(["lora"] if student["lora"] is not None else [])],
    )
    parts = [
        f"# {escaped(student['name'])}, trained on a choice by {escaped(trained['rule'])}",
        _summary(trained, selection, adapter=adapter, merged=merged),
        *([f"{weights[0].upper()}{weights[1:]}."] if weights else []),
        "## Load it\n\n" + _code("python", _loading(student, adapter)),
        "## What it was trained on\n\n" + table(("fact", "value"), _data_rows(trained, selection)),
        "## How it was trained\n\n" + table(("setting", "value"), _recipe_rows(trained)),
        *_figures(trained, metrics),
        *_replay(trained.get("run")),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _summary(trained: Mapping[str, Any], selection: Mapping[str, Any], *, adapter: bool, merged: bool) -> str:
    student, counts = trained["student"], selection["counts"]
    what = "A LoRA adapter for" if adapter else "A LoRA adapter merged into" if merged else "All parameters of"
    place = student["id"] if student["path"] is None else Path(student["path"]).name
    of = (
        f" of {counts['candidates']:,} candidates for {counts['problems']:,} problems" if "candidates" in counts else ""
    )
    weights = "each with its weight" if trained["identity"]["recipe"].get("weighted", True) else "with equal weights"
    return (
        f"{what} {_verbatim(place)}, trained for {trained['steps']:,} optimizer steps on {trained['trajectories']:,} "
        f"trajectories{of}, {weights}."
    )


def _loading(student: Mapping[str, Any], adapter: bool) -> str:
    """Python that loads the student and answers a question."""
    if not adapter:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        return _LOAD.format(imports=imports, model='model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")')
    path, merged = student["path"] or "", student.get("adapter") or []
    if path.endswith(".gguf") or merged:  # peft alone finds no base then
        where, keywords = path or student["id"], ""
        if path.endswith(".gguf"):
            where, keywords = str(Path(path).parent), f", gguf_file={Path(path).name!r}"
        names, auto = "AutoModelForCausalLM, AutoTokenizer, GenerationConfig", "PeftModel"
        lines = [f'model = AutoModelForCausalLM.from_pretrained({where!r}{keywords}, dtype="auto")']
        lines += [f"model = PeftModel.from_pretrained(model, {folder!r}).merge_and_unload()" for folder in merged]
        lines.append("model = PeftModel.from_pretrained(model, folder)")
    else:
        names, auto = "AutoTokenizer, GenerationConfig", "AutoPeftModelForCausalLM"
        lines = ['model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")']
    lines.append("model.generation_config = GenerationConfig.from_pretrained(folder)  # the base's may never stop")
    imports = f"from peft import {auto}\nfrom transformers import {names}"
    return _LOAD.format(imports=imports, model="\n".join(lines))


def _data_rows(trained: Mapping[str, Any], selection: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    identity, inputs, counts = trained["identity"]["student"], selection["inputs"], selection["counts"]
    if "weights" in identity:
        yield "student", f"{escaped(trained['student']['name'])}, weights {_verbatim(identity['weights'])}"
    else:
        yield "student", f"{_verbatim(identity['id'])} at commit {_verbatim(identity['revision'])}"
    yield "task", escaped(trained["task"])
    yield "pool", f"fingerprint {_verbatim(inputs['pool'])}"
    yield "rows dropped", _counts(inputs["dropped_rows"])
    yield "rule", escaped(selection["rule"])
    yield from ((name, _verbatim(trained[name])) for name in ("score", "filter") if trained[name] is not None)
    if "policy" in selection:
        known = ("kind", "budget", "tau", "radius", "prior", "match")
        given = {name: selection["policy"][name] for name in known if selection["policy"].get(name) is not None}
        yield "policy", _verbatim(", ".join(f"{name} {_value(value)}" for name, value in given.items()))
    yield "statistics of", escaped(inputs["asked"])
    yield "candidates", _counts(counts)
    yield "trained tokens", f"{trained['tokens']:,} in one pass over the choice"
    if "effective_sample_size" in selection:
        yield "effective sample size", f"{selection['effective_sample_size']:,.0f} of {trained['trajectories']:,}"
    if shares := selection.get("teacher_share"):
        shown = [f"{escaped(name)} {share:.0%}" for name, share in list(shares.items())[:_TEACHERS_SHOWN]]
        more = f" and {len(shares) - len(shown)} more" if len(shares) > len(shown) else ""
        yield "weight by teacher", ", ".join(shown) + more


def _recipe_rows(trained: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    identity = trained["identity"]
    yield "optimizer steps", f"{trained['steps']:,}"
    for name, value in identity["recipe"].items():
        yield escaped(name), _verbatim(_value(value))
    for name in ("seed", "precision"):
        yield name, _verbatim(identity[name])
    yield "max_length", _verbatim(", ".join(map(str, identity["max_length"])))
    lora = trained["student"]["lora"]
    yield "LoRA", _verbatim(_value(lora)) if lora is not None else "none: every parameter"
    for name in ("adapter", "end_token"):
        if trained["student"].get(name):
            yield escaped(name), _verbatim(_value(trained["student"][name]))
    yield "seconds in the process that finished it", f"{trained['seconds']:,.0f}"


def _figures(trained: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> Iterator[str]:
    """Sections on what was measured: held-out loss, and evaluation once there is one."""
    if curve := trained["curve"]:
        first, last = curve[0], curve[-1]
        names = {"held_out/loss": "all held-out trajectories", "held_out/loss_correct": "correct ones"}
        rows = [(text, f"{first[name]:.4f}", f"{last[name]:.4f}") for name, text in names.items() if name in last]
        header = ("", f"step {first['step']}", f"step {last['step']}")
        yield "## Held-out loss (nats/token)\n\n" + table(header, rows)
    if metrics and metrics["sets"]:
        sets, how = metrics["sets"], metrics["identity"]
        keys = list(dict.fromkeys(key for figures in sets.values() for key in figures))
        rows = [(escaped(key), *(_value(figures.get(key)) for figures in sets.values())) for key in keys]
        sampling = ", ".join(f"{name} {_value(value)}" for name, value in how["sampling"].items())
        checker, _, _, longest = how["task"]
        yield (
            "## Evaluation\n\n"
            + table(("", *(escaped(name) for name in sets)), rows)
            + f"\n\nSampled with {_verbatim(sampling)}, at most {longest} new tokens, seed {how['seed']}, in "
            f"{_verbatim(how['dtype'].removeprefix('torch.'))}; checked by {_verbatim(checker)}."
        )


def _replay(run: str | None) -> Iterator[str]:
    if run is not None:
        command = f"python -m lark.run --config-path {shlex.quote(run)} --config-name replay"
        yield "## Again\n\n" + _code("bash", command)


def escaped(text: object) -> str:
    """Text of a user's as itself in Markdown, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def _verbatim(text: object) -> str:
    """Text as code, on one line; a table's cell ends at no `|` in it."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    longest = max((len(ticks) for ticks in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line}`"


def _code(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any in the text."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _counts(counts: Mapping[str, int]) -> str:
    shown = [f"{count:,} {escaped(name.replace('_', ' '))}" for name, count in counts.items() if count]
    return ", ".join(shown) or "none"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
