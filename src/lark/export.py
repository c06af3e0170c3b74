"""`python -m lark.export <arm> <folder>`: a trained student as a folder that other tools load.

Under LoRA that is the adapter alone or, with --merge, one whole model; either with tokenizer, chat template, generation
config and model card.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from lark.common.cache import read_json, write_json
from lark.common.errors import LarkError
from lark.common.log import announce, logger, open_log

DTYPES = ("float32", "bfloat16", "float16")


def export(
    arm: str | Path, out: str | Path, *, merge: bool = False, dtype: str | None = None, base: str | None = None
) -> None:
    """Write the student that was trained in `arm` to the folder `out`, whole or not at all.

    arm: logs/arms/<hash>, or a run's link to it (<run>/selector).
    out: a folder that is not there yet, or empty.
    merge: add the LoRA adapter to the base's weights, in float32.
    dtype: float32 | bfloat16 | float16, to which the weights are cast at last; null keeps what the arm's files have,
        for a merged model what the base's have.
    base: where the base's weights are now (folder, .gguf file or hub id), if no longer where the arm found them.

    Raises LarkError if there is no trained arm, `out` is in use, or the base's weights are missing or others.
    """
    arm, out = Path(arm), Path(out)
    from lark.training.arms import read_arm
    from lark.training.model_card import write_card

    trained = read_arm(arm)
    student, checkpoint = trained["student"], arm / "checkpoint"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LarkError(f"{out} is there already and not an empty folder; name another, or remove it")
    if dtype not in (None, *DTYPES):
        raise LarkError(f"--dtype {dtype} is unknown; set it to one of {', '.join(DTYPES)}")
    is_adapter = student["lora"] is not None
    if base is not None and not is_adapter:
        raise LarkError(f"--base {base}: this student was trained whole and has no base; leave it out")
    if merge and not is_adapter:
        logger.warning("--merge: nothing to merge, every parameter was trained")
    merge = merge and is_adapter
    if merge or base is not None:
        student |= _locate_base(student, base)
        _check_base(trained)

    temporary = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if merge or (dtype is not None and not is_adapter):
            weights = _write_model(student, checkpoint, temporary, dtype, merge=merge)
        else:
            weights = _write_copy(student, checkpoint, temporary, dtype, base)
        write_card(temporary, arm, merged=merge, weights=weights)
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    announce("export", f"{out}: {weights}")


def _locate_base(student: dict[str, Any], base: str | None) -> dict[str, Any]:
    """Return the student's settings that change where `base` says where its weights are."""
    if base is None or (student["path"] is None and base == student["id"]):
        return {}
    if Path(base).exists():
        return {"path": str(Path(base).absolute())}
    return {"path": None, "id": base, "revision": None}


def _check_base(trained: dict[str, Any]) -> None:
    """Raise LarkError if the base's weights are missing or are not those that were trained."""
    from lark.student.student import Student

    try:
        student = Student(**trained["student"])
        found, known = student.identity(), trained["identity"]["student"]
    except ValueError as error:
        raise LarkError(
            f"the adapter's base is missing ({error}); say --base <folder, .gguf file or hub id>"
        ) from error
    if not found.keys() <= known.keys():  # a folder then, the hub now, or the other way round
        logger.warning("%s cannot be compared with the base that was trained (%s)", student.path or student.id, known)
    elif found != {key: known[key] for key in found}:
        raise LarkError(
            f"{student.path or student.id} holds other weights ({found}) than those the adapter was trained on "
            f"({ {key: known[key] for key in found} }); use --base <folder, .gguf file or hub id> with the right ones"
        )


def _write_model(student: dict[str, Any], checkpoint: Path, folder: Path, dtype: str | None, *, merge: bool) -> str:
    """Write one whole model, of base and adapter or as it was trained, in `dtype`; say what it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lark.student.chat import Chat
    from lark.student.student import Student, save_student

    remote = student["trust_remote_code"]
    model: Any
    if merge:
        loader = Student(**student)
        dtype = dtype or _read_dtype(loader)
        adapted: Any = loader.load_trained(checkpoint, torch.float32)
        model = adapted.merge_and_unload()
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        if head is not embedding and not torch.equal(head, embedding):
            model.config.tie_word_embeddings = False  # a head of its own, such as modules_to_save=[lm_head] trains
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True, trust_remote_code=remote)
    assert dtype is not None
    for parameter in model.parameters():  # not model.to: buffers keep their precision
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=remote)
    save_student(model, Chat(tokenizer=tokenizer, template=tokenizer.chat_template), folder)
    if merge:
        return f"the adapter merged into its base in float32, then saved in {dtype}"
    return f"the whole model in {dtype}"


def _read_dtype(student: Any) -> str:
    """Return the dtype of the student's files; float32 where they do not say, and for the dequantised weights of a
    .gguf file."""
    from transformers import AutoConfig

    source, keywords = student.pretrained_arguments()
    if "gguf_file" in keywords:
        return "float32"
    dtype = AutoConfig.from_pretrained(source, **keywords).get_text_config().dtype
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _write_copy(student: dict[str, Any], checkpoint: Path, folder: Path, dtype: str | None, base: str | None) -> str:
    """Copy the arm's files as they are, but for an adapter's dtype and where it says its base is."""
    shutil.copytree(checkpoint, folder)
    if student["lora"] is None:
        return "the whole model as it was trained"
    if base is not None:
        from lark.student.student import Student

        settings = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", settings | Student(**student).describe_base())
    if dtype is None:
        return "the adapter as it was trained"
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return f"the adapter in {dtype}"


def build_parser() -> argparse.ArgumentParser:
    about = __doc__.partition("\n")[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="python -m lark.export", description=about)
    parser.add_argument("arm", type=Path, help="folder of a trained arm: <run>/selector, or logs/arms/<hash>")
    parser.add_argument("folder", type=Path, help="folder to write to: not there yet, or empty")
    parser.add_argument("--merge", action="store_true", help="add the LoRA adapter to its base: one whole model")
    parser.add_argument("--dtype", choices=DTYPES, help="of the saved weights; default: the arm's, merged the base's")
    parser.add_argument("--base", help="where the base's weights are now: folder, .gguf file or hub id")
    return parser


def main() -> None:
    given = build_parser().parse_args()
    try:
        with open_log(None):
            export(given.arm, given.folder, merge=given.merge, dtype=given.dtype, base=given.base)
    except (LarkError, OSError) as error:
        sys.exit(f"lark: {error}")


if __name__ == "__main__":
    main()
