"""The process that vLLM lives in: reads requests from a folder, appends what it has sampled to a file there.

    python -P vllm_worker.py <folder>

It may run under another Python than the rest of the package (vLLM pins its own torch), so it imports nothing of it.

settings.json   "engine": arguments of vllm.LLM; "sampling": arguments of vllm.SamplingParams but the seed; "adapter":
                folder or null
requests.jsonl  {"prompt_token_ids": [...], "seed": int, "number": int}
tokens.jsonl    {"number": int, "token_ids": [...], "end": "stop" or "length"}, appended as samples end
engine.json     versions and devices
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

MISSING = 3
"""Exit code where vLLM cannot be imported."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM has kernels for


def main(folder: Path) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import vllm  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return MISSING
    import torch

    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    engine, adapter, lora = settings["engine"], settings["adapter"], None
    if engine["tensor_parallel_size"] is None:
        engine["tensor_parallel_size"] = max(1, torch.cuda.device_count())
    if adapter is not None:
        rank = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        engine |= {"enable_lora": True, "max_lora_rank": min((r for r in _RANKS if r >= rank), default=rank)}
        lora = LoRARequest("adapter", 1, adapter)
    llm = vllm.LLM(**engine)
    record = {"engine": "vllm", "version": vllm.__version__, "torch": torch.__version__, "arguments": engine}
    _write(folder / "engine.json", record)
    numbers = {}
    with open(folder / "requests.jsonl", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            own = vllm.SamplingParams(
                **settings["sampling"], seed=request["seed"], n=1, output_kind=RequestOutputKind.FINAL_ONLY
            )
            prompt = {"prompt_token_ids": request["prompt_token_ids"]}
            name = str(request["number"])
            # Some versions give a request a name of their own.
            names = {name, llm.llm_engine.add_request(name, prompt, own, lora_request=lora)}
            numbers |= dict.fromkeys(names - {None}, request["number"])
    with open(folder / "tokens.jsonl", "a", encoding="utf-8") as file:
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    file.write(json.dumps(_row(numbers[output.request_id], output.outputs[0])) + "\n")
            file.flush()
    return 0


def _row(number: int, output) -> dict:
    ids = list(output.token_ids)
    if output.finish_reason == "stop" and isinstance(output.stop_reason, int) and ids[-1:] != [output.stop_reason]:
        ids.append(output.stop_reason)  # a version that leaves the end token out
    assert output.finish_reason in ("stop", "length"), f"vLLM ended a sample by {output.finish_reason}"
    return {"number": number, "token_ids": ids, "end": output.finish_reason}


def _write(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    os.replace(temporary, path)


def _end_with_parent() -> None:
    """The parent holds the other end of our input: its end, however it came, is ours and that of vLLM's processes."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
