"""Generation with vLLM, in a process of its own: prompts -> samples, like `generate_samples` of transformers_backend.

vLLM pins its own torch and does not give memory back, so it lives in a process, and if need be in a Python, of its own
(`lark.generation.vllm_worker`). Each sample has a seed of its own, from (seed, problem, sample); yet vLLM's sums depend
on what it computes at the same time, so samples are not reproducible bit for bit. Nor are they those of transformers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from lark.common.cache import read_json, write_json, write_text
from lark.common.errors import LarkError
from lark.common.log import logger
from lark.generation import vllm_worker
from lark.generation.sampling import hash_sample
from lark.generation.transformers_backend import Sample, check_prompts, check_sampling, decode_sample
from lark.student.student import Student

PYTHON = "LARK_VLLM_PYTHON"
"""Environment variable: the Python that has vLLM, where no setting names it."""
REMEDY = "make vllm in the checkout installs it, or name a Python that has it in evaluation.vllm_python"
_POLL_SECONDS = 0.2
_OF_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAST_LINES = 15


def find_vllm_python() -> str:
    """Find the Python that has vLLM: the one that LARK_VLLM_PYTHON names, else that of `make vllm` (below the current
    folder or the checkout), else this one.
    """
    if named := os.environ.get(PYTHON):
        return named
    made = (folder / ".vllm" / "bin" / "python" for folder in (Path.cwd(), Path(__file__).parents[3]))
    return next((str(python) for python in made if python.is_file()), sys.executable)


def find_vllm_source(student: Student, checkpoint: str | Path | None = None) -> dict[str, Any]:
    """Find `model`, `revision`, `adapter` and `config` of `generate_with_vllm` for a student, or one trained from it.

    checkpoint: the folder that training left: an adapter's where the student has LoRA, else the whole student's.

    Raises:
        LarkError: weights that vLLM does not read as they are (GGUF files, several adapters).
    """
    if checkpoint is not None and student.lora is None:
        return {"model": str(checkpoint), "revision": None, "adapter": None, "config": None}  # its config.json has it
    adapters = [*student.adapters, *([str(checkpoint)] if checkpoint is not None else [])]
    if len(adapters) > 1:
        raise LarkError(
            f"model.adapter={student.adapter} makes {len(adapters)} adapters with the trained one, and vLLM takes one; "
            "merge them with python -m lark.export, or set evaluation.engine=transformers"
        )
    if student.path is not None and student.path.endswith(".gguf"):
        raise LarkError(
            f"model.path={student.path} is a .gguf file, which vLLM is not given; export it with python -m "
            "lark.export, or set evaluation.engine=transformers"
        )
    source = str(student.id) if student.folder is None else str(student.folder)
    revision = student.revision if student.folder is None else None
    adapter = adapters[0] if adapters else None
    return {"model": source, "revision": revision, "adapter": adapter, "config": student.config}


def generate_with_vllm(
    folder: str | Path,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    *,
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    config: dict[str, Any] | None = None,
    dtype: str = "auto",
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    stop_ids: Sequence[int],
    done: Collection[tuple[str, int]] = (),
    devices: Sequence[int] | None = None,
    tensor_parallel_size: int | None = None,
    gpu_memory_utilization: float = 0.9,
    python: str | None = None,
) -> Iterator[list[Sample]]:
    """Draw samples with vLLM; yields them as they end, in no order. The caller keeps them: nothing is read again.

    Args:
        folder: for requests and tokens, vLLM's output (vllm.log), and engine.json, which says what was used and
            `"bit_reproducible": false`.
        tokenizer: decodes what was sampled; vLLM is given token ids.
        model: a folder in transformers' format, or an id of the hub, with `revision`.
        adapter: folder of a peft LoRA adapter on top of it.
        dtype: auto (the weights' own), float32, bfloat16 or float16.
        devices: the GPUs it may use, of those that are visible here; None: all.
        tensor_parallel_size: GPUs a model is divided over; None: all that are visible. vLLM wants it to divide the
            number of attention heads.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes.
        python: interpreter that has vLLM; None: `find_vllm_python()`.

    Further arguments are those of `generate_samples`.

    Raises:
        LarkError: a setting is out of its range, vLLM is not installed, or its process ended before its samples (with
            the last lines that it printed).
    """
    check_sampling(samples, temperature, top_p, None)
    longest = check_prompts(prompts, keys, max_new_tokens, stop_ids)
    wanted = [(i, n) for i, key in enumerate(keys) for n in range(samples) if (key, n) not in done]
    if not wanted:
        return
    folder, python = Path(folder), python or find_vllm_python()
    settings = {
        "engine": {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": longest + max_new_tokens,
            "seed": 0,
            "trust_remote_code": False,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # none of the model's own settings
            **({"hf_overrides": dict(config)} if config else {}),
        },
        "sampling": {
            "temperature": float(temperature),
            "top_p": float(top_p),
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # the tokens given end a sample, and no others
            "detokenize": False,
        },
        "adapter": adapter,
    }
    waiting = dict(enumerate(sorted(wanted, key=lambda pair: -len(prompts[pair[0]]))))
    requests = [
        {"prompt_token_ids": list(prompts[i]), "seed": derive_vllm_seed(seed, keys[i], n), "number": number}
        for number, (i, n) in waiting.items()
    ]
    write_json(folder / "settings.json", settings)
    write_text(folder / "requests.jsonl", "".join(json.dumps(row) + "\n" for row in requests))
    (folder / "tokens.jsonl").write_bytes(b"")
    logger.info(
        "vllm: %d samples by %s; not reproducible bit for bit; output in %s", len(waiting), python, folder / "vllm.log"
    )
    process = _start(python, folder, devices)
    try:
        with open(folder / "tokens.jsonl", "rb") as tokens:
            code = None
            while code is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                code = process.poll()  # asked before reading: what was written before its end is read
                batch = []
                for row in _read_rows(tokens):
                    i, n = waiting.pop(row["number"])
                    batch.append(decode_sample(tokenizer, keys[i], n, row["token_ids"], stop_ids))
                if batch:
                    yield batch
    finally:
        _end(process)
    if code == vllm_worker.MISSING:
        raise LarkError(
            f"evaluation.engine=vllm needs vLLM, which {python} cannot import ({_last_lines(folder, 1)}): {REMEDY}"
        )
    if code != 0 or waiting:
        raise LarkError(
            f"evaluation.engine=vllm: vLLM ended with exit code {code} and {len(waiting)} of {len(wanted)} samples "
            "missing; the others are kept and a repeated command goes on from them. The last lines of "
            f"{folder / 'vllm.log'}:\n{_last_lines(folder, _LAST_LINES)}"
        )
    record = read_json(folder / "engine.json")
    write_json(folder / "engine.json", record | {"python": python, "bit_reproducible": False})


def derive_vllm_seed(seed: int, problem_id: str, sample: int) -> int:
    """Derive vLLM's seed of one sample, 63 bits."""
    return int.from_bytes(hash_sample(seed, problem_id, sample)[16:24], "little") >> 1


def _read_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows that another process has completed since the last call."""
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def _start(python: str, folder: Path, devices: Sequence[int] | None) -> subprocess.Popen[bytes]:
    # Not as a module: that Python need not have this package. -P: nor may this package's modules hide others.
    command = [python, "-P", str(Path(vllm_worker.__file__).resolve()), str(folder)]
    with open(folder / "vllm.log", "wb") as log:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=make_environment(devices),
                start_new_session=True,
            )
        except OSError as error:
            raise LarkError(
                f"evaluation.vllm_python={python} cannot be started ({error.strerror}): {REMEDY}"
            ) from error


def make_environment(devices: Sequence[int] | None) -> dict[str, str]:
    """Make the environment of a job of its own, whatever rank this process is, which sees these of our GPUs."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    environment["PYTHONUNBUFFERED"] = "1"
    if devices is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else list(map(str, range(max(devices) + 1)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in devices)
    return environment


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the input of the process, which ends it and those that vLLM has started."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _last_lines(folder: Path, count: int) -> str:
    lines = (folder / "vllm.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-count:])
