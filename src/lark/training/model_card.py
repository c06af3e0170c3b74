"""The model card of a trained arm: README.md in its checkpoint and in what is exported of it.

The card is rendered from the arm's files alone (template: model_card.md.jinja), so it claims nothing that was not
measured. Texts that come from users (names of models, rules, teachers, sets) are escaped.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lark.common.cache import read_json, write_text

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&])")
_TEACHERS_SHOWN = 12
_SAMPLING = ("samples", "pass_at", "temperature", "top_p", "engine", "dtype")
_POLICY = ("kind", "budget", "tau", "radius", "prior", "match")

_LOAD = """\
{imports}

folder = "."  # of this card
{model}
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=512)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def write_card(folder: Path, arm_folder: Path, **how: Any) -> None:
    """Write README.md of the arm in `arm_folder` to `folder`; `how`: see `render_card`."""
    trained = read_json(arm_folder / "trained.json")
    selection, evaluation = (
        read_json(path) if (path := arm_folder / name).is_file() else None
        for name in ("selection.json", "metrics.json")
    )
    run = arm_folder.parent.absolute()
    replayed = str(run) if (run / "replay.yaml").is_file() else None
    write_text(folder / "README.md", render_card(trained, selection, evaluation, run=replayed, **how))


def render_card(
    trained: Mapping[str, Any],
    selection: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    run: str | None = None,
    merged: bool = False,
    weights: str | None = None,
) -> str:
    """Render the card as Markdown with its YAML header.

    trained, selection, evaluation: trained.json, selection.json and metrics.json; selection is None where it is not
        known which rule chose (an arm outside its run), evaluation before there is one.
    run: the folder to replay it from.  merged: the LoRA adapter has been added to the base's weights.  weights: what
        the files beside the card hold, in words.
    """
    student = trained["student"]
    is_adapter = student["lora"] is not None and not merged
    header = ModelCardData(
        base_model=student["id"] if student["path"] is None else None,  # the hub's ids only
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lark", "data-selection", "sft", *(["lora"] if student["lora"] is not None else [])],
    )
    sets, teachers = (evaluation or {}).get("metrics", {}), list((selection or {}).get("teacher_share", {}).items())
    policy = (selection or {}).get("policy", {})
    facts = {
        "trained": trained,
        "selection": selection,
        "evaluation": evaluation,
        "student": student,
        "held_out": trained["held_out"],
        "is_adapter": is_adapter,
        "is_merged": merged,
        "weights": weights,
        "place": student["id"] if student["path"] is None else Path(student["path"]).name,
        "loading": _write_loading_code(student, is_adapter),
        "policy": {name: policy[name] for name in _POLICY if policy.get(name) is not None},
        "teachers": teachers[:_TEACHERS_SHOWN],
        "more_teachers": len(teachers[_TEACHERS_SHOWN:]),
        "set_names": [escape_markdown(name) for name in sets],
        "metric_names": list(dict.fromkeys(name for figures in sets.values() for name in figures)),
        "sampling": _show({name: evaluation["sampling"][name] for name in _SAMPLING}) if evaluation and sets else "",
        "replay": f"python -m lark.run --config-path {shlex.quote(run)} --config-name replay" if run else None,
    }
    functions = {"text": escape_markdown, "code": _quote, "fence": _fence, "counts": _count, "show": _show}
    return ModelCard.from_template(header, template_path=str(TEMPLATE), **facts, **functions).content + "\n"


def _write_loading_code(student: Mapping[str, Any], is_adapter: bool) -> str:
    """Write Python that loads the student and answers a question."""
    if not is_adapter:
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


def escape_markdown(text: object) -> str:
    """Return a user's text so that Markdown shows it as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def _quote(text: object) -> str:
    """Return text as inline code, on one line; a `|` in it ends no table cell."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (_longest_ticks(line) + 1)
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def _fence(language: str, text: str) -> str:
    """Return a code block whose fence is longer than any in the text."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max((len(ticks) for ticks in re.findall("`+", text)), default=0)


def _count(counts: Mapping[str, int]) -> str:
    shown = [f"{count:,} {escape_markdown(name.replace('_', ' '))}" for name, count in counts.items() if count]
    return ", ".join(shown) or "none"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_show, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
