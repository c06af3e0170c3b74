"""Training against Hugging Face's Trainer, the same with its rows grouped by length, and TRL's packing.

    python benchmarks/train.py                                                     the embedded task and student
    python benchmarks/train.py --pool pool.jsonl --model-path SmolLM2-135M-Instruct.gguf --steps 4 --dtype float32

Every contender trains the same student from the same start (LoRA as in conf/model/smollm2.yaml but without dropout, or
every parameter with --full) on the same tokens and spans, with AdamW, learning rates, clipping and loss (the mean over
a global batch's trained tokens) alike. Each runs in a process of its own (this script with `--only <name>`), so that
peak memory is its own. Time and memory are those of the optimizer steps; loading, tokenising and packing do not count.

hf          transformers.Trainer, padded micro-batches of 8 trajectories; exactly our global batches, in our order
hf_grouped  the same with train_sampling_strategy=group_by_length and the fastest micro-batch of 1, 2, 4, 8, 16
trl         trl.SFTTrainer with packing (bfd: no trajectory is cut), packed rows of 512, 1024 or 2048 tokens, whichever
            is fastest (of the longest trajectory's length at least)
ours        lark.training.sft_module.SFTModule fed by TrajectoryDataModule, by Recipe's defaults but weights 1 and
            average=token

Ratios above 1 mean that ours is faster, or leaner. In float32 the losses of hf and ours must agree to 1e-4 on the first
steps, else the script ends with status 1. The limit is that of the matrix products alone, for tokens that are distinct
once beginnings are shared, without padding: 2 products (forward, and the gradient of the input) for frozen matrices, 3
for trained ones. The last line is JSON: ratio_hf, ratio_hf_grouped, ratio_trl (null where trl is not installed),
peak_bytes (ours, while it trains), and further figures; cpu_seconds tell of a machine that others use as well.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import (
    follow,
    leakage,
    loaded_dtype,
    mean_loss,
    on_device,
    packing_trainer,
    padding_trainer,
    train_ours,
)
from inputs import add_arguments, open_data
from profiles import OTHER, operations, part_of, profiler, shares
from throughput import gemm_seconds

from lark.selection.selection import Selection
from lark.student.attention import build_prefix_tree
from lark.student.batching import draw_step_rows
from lark.student.model_parts import get_base_model, get_head
from lark.training.datamodule import TrajectoryDataModule
from lark.training.recipe import Recipe

CONTENDERS = ("hf", "hf_grouped", "trl", "ours")
SIZES = (8, 1, 2, 4, 16)  # trajectories of a padded micro-batch, the usual one first
WIDTHS = (1024, 512, 2048)  # tokens of a packed row
LORA = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.0, "target_modules": "all-linear"}
AGREEING_STEPS, TOLERANCE = 3, 1e-4  # of hf and ours, nats/token; later steps drift apart by rounding
FAR = 0.05  # of losses after training on the same rows in another order, nats/token
LEAK = 1e-2  # difference of logits from which on a packed document must have seen another


def open_rows(arguments: argparse.Namespace, cache: Path) -> tuple[TrajectoryDataModule, np.ndarray]:
    """The data, with rows of the pool drawn by chance as its selection; the rows of each global batch
    [steps, trajectories], in the order of training.
    """
    steps, size = arguments.steps, arguments.batch_size
    lr = arguments.lr or (1e-5 if arguments.full else 1e-4)
    recipe = Recipe(steps=steps, batch_size=size, lr=lr, weighted=False, average="token", validations=1)
    lora = None if arguments.full else LORA
    data = open_data(arguments, cache, limit=arguments.problems, dtype=arguments.dtype, recipe=recipe, lora=lora)
    wanted = arguments.rows or steps * size
    rows = np.sort(np.random.default_rng(0).permutation(data.scored)[:wanted])
    ones = np.ones(len(rows))
    data.selections["selector"] = Selection(
        row=rows, q=ones, weight=ones, score=ones, record={}, score_N=ones, taken_by_problem={}
    )
    order = [draw_step_rows(len(rows), size, seed=data.seed, step=number) for number in range(steps)]
    return data, rows[np.stack(order)]


def settings_of(name: str, data: TrajectoryDataModule, batches: np.ndarray) -> list[int]:
    """Trajectories of a micro-batch, or tokens of a packed row, that may be tried, the usual one first."""
    if name == "trl":
        longest = int(data.trajectories.length[batches].max())
        return list(dict.fromkeys(max(width, longest) for width in WIDTHS))
    sizes = SIZES if name == "hf_grouped" else SIZES[:1]
    return list(dict.fromkeys(math.gcd(size, batches.shape[1]) for size in sizes))


def contend(name: str, data: TrajectoryDataModule, batches: np.ndarray, setting: int | None) -> dict[str, Any]:
    """What the contender does on `batches`."""
    pool, facts = data.trajectories, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if name == "ours":
            model, clock = train_ours(data, len(batches), folder)
        else:
            setting = setting or settings_of(name, data, batches)[0]
            if name == "trl":
                trainer = packing_trainer(data, batches, folder, width=setting)
            else:
                trainer = padding_trainer(data, batches, folder, size=setting, grouped=name == "hf_grouped")
            clock, model = follow(trainer), trainer.model
            facts = {"leakage": leakage(trainer)} if name == "trl" else {}
    base: Any = get_base_model(model)
    base.set_attn_implementation(data.student.attention)  # ours has replaced it
    trained = int(pool.span_tokens[batches].sum())
    return facts | {
        "setting": setting,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "trained_tokens_per_s": trained / clock.seconds,
        "trained_tokens": trained,
        "row_tokens": int(pool.length[batches].sum()),
        "computed_tokens": clock.computed_tokens,
        "peak_bytes": clock.peak_bytes,
        "losses": clock.losses,
        "final_loss": mean_loss(base, pool, batches[-1]),
        "limit": limit(data, model, batches, min(4.0, clock.seconds)) if name == "ours" else None,
    }


def limit(data: TrajectoryDataModule, model: Any, batches: np.ndarray, seconds: float) -> dict[str, float] | None:
    """Seconds of the matrix products of training on `batches`, a token that rows of a global batch begin alike with
    counted once: those of the student's own matrices, and of LoRA's.
    """
    pool, spans = data.trajectories, float(data.trajectories.span_tokens[batches].sum())
    tokens = float(
        sum(len(build_prefix_tree([row.input_ids for row in pool.read_tokens(rows)])[0]) for rows in batches)
    )
    if data.student.lora is None:
        rates = gemm_seconds(get_base_model(model), get_head(model), seconds=seconds)
        return None if rates is None else {"own": 3 * (tokens * rates[0] + spans * rates[1]), "lora": 0.0}
    plain = on_device(data.student.load_model(loaded_dtype(data)))
    frozen = gemm_seconds(plain, get_head(plain), seconds=seconds)
    adapters = gemm_seconds(Adapters(model), get_head(plain), seconds=seconds)
    if frozen is None or adapters is None:
        return None
    return {"own": 2 * (tokens * frozen[0] + spans * frozen[1]), "lora": 3 * tokens * adapters[0]}


class Adapters(torch.nn.Module):
    """LoRA's matrices alone, to be timed as a decoder is: the difference of two timings would be mostly noise."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        named = model.named_modules()
        self.layers = torch.nn.ModuleList(m for name, m in named if ".lora_" in name and type(m) is torch.nn.Linear)

    def get_decoder(self) -> torch.nn.Module:
        return self.layers


def fastest(name: str, data: TrajectoryDataModule, batches: np.ndarray) -> dict[str, Any]:
    """The setting with the most trained tokens a second on `batches`, and those of all."""
    tried = {
        setting: contend(name, data, batches, setting)["trained_tokens_per_s"]
        for setting in settings_of(name, data, batches)
    }
    return {"setting": max(tried, key=lambda setting: tried[setting]), "tried": tried}


def profiled(data: TrajectoryDataModule, batches: np.ndarray) -> dict[str, float]:
    """Share of our optimizer steps' time by part, from a profile of their operations."""
    profile = profiler()
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train_ours(data, len(batches), Path(folder), profile)
    vocabulary, rank = get_head(model).weight_VD.shape[0], None
    if data.student.lora is not None and not any(
        LORA["r"] in p.shape for p in get_base_model(model).parameters() if not p.requires_grad
    ):
        rank = LORA["r"]  # else LoRA's products cannot be told from the others by their shapes
    return shares((_part(event, vocabulary, rank), event) for event in operations(profile.events()))


def _part(event: Any, vocabulary: int, rank: int | None) -> str:
    above, parent = [], event.cpu_parent
    while parent is not None:
        above.append(parent.name)
        parent = parent.cpu_parent
    if any(name.startswith("Optimizer") for name in [event.name, *above]):
        return "optimizer"
    part = part_of(event.name, event.input_shapes, vocabulary=vocabulary, of_logits="softmax and loss", rank=rank)
    backward = any(name.startswith("autograd::engine") for name in above)
    return part + (" (backward)" if backward and part != OTHER else "")


def invoke(name: str, *extra: str, say: str) -> dict[str, Any]:
    """The last line of this script as the process of one contender."""
    print(f"measuring {name} {say}".rstrip(), file=sys.stderr)
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, *extra]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{name} {say} failed; its messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, cache: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """Figures of every contender, the settings tried, and shares of our time."""
    names = [name for name in CONTENDERS if name != "trl" or importlib.util.find_spec("trl")]
    tried: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name in ("hf_grouped", "trl"):
        if name in names and arguments.try_steps:
            tried[name] = invoke(name, "--cache", cache, "--try", say="in every setting")
    for number in range(arguments.rounds):
        for name in names:
            setting = ["--setting", str(tried[name]["setting"])] if name in tried else []
            said = f"(round {number + 1} of {arguments.rounds})"
            result = invoke(name, "--cache", cache, *setting, say=said)
            if name not in found or result["seconds"] < found[name]["seconds"]:
                found[name] = result
    parts = invoke("ours", "--cache", cache, "--parts", say="for its parts") if arguments.profile else {}
    return found, tried, parts


def report(arguments: argparse.Namespace, found: dict[str, Any], tried: dict[str, Any], parts: dict[str, float]) -> int:
    """Prints table and JSON; the exit status."""
    mine = found["ours"]
    limits = mine["limit"] or {}
    print(
        f"{'LoRA' if not arguments.full else 'every parameter'}, {arguments.steps} optimizer steps of "
        f"{arguments.batch_size} trajectories: {mine['row_tokens']:,} tokens, of which {mine['trained_tokens']:,} "
        f"trained; {arguments.dtype}, {torch.get_num_threads()} threads, {where()}"
    )
    print(
        "            trained tokens/s    ratio   CPU s   peak GiB    ratio   computed   of limit   final loss   setting"
    )
    for name, of in found.items():
        setting = "defaults" if name == "ours" else f"{of['setting']} tokens" if name == "trl" else of["setting"]
        share = f"{sum(limits.values()) / of['seconds']:.0%}" if limits else "?"
        print(
            f"{name:<11} {of['trained_tokens_per_s']:>16,.0f} {of['seconds'] / mine['seconds']:>7.2f}x "
            f"{of['cpu_seconds']:>7.1f} {of['peak_bytes'] / 2**30:>10.2f} "
            f"{of['peak_bytes'] / mine['peak_bytes']:>7.2f}x {of['computed_tokens'] / of['row_tokens']:>9.2f}x "
            f"{share:>10} {of['final_loss']:>12.4f}   {setting}"
        )
    for name, of in tried.items():
        rates = ", ".join(f"{setting}: {rate:,.0f}" for setting, rate in of["tried"].items())
        print(f"tried       {name}: {rates} trained tokens/s")
    if limits:
        print(
            f"limit       {sum(limits.values()):.2f} s of matrix products, of which LoRA's own {limits['lora']:.2f} s; "
            f"ours takes {mine['seconds']:.2f} s, {limits['own'] / mine['seconds']:.0%} of it in the student's own"
        )
    first = list(zip(found["hf"]["losses"], mine["losses"], strict=True))
    difference = max(abs(a - b) for a, b in first[:AGREEING_STEPS])
    agree = difference <= TOLERANCE
    print(
        f"losses      hf and ours {'agree' if agree else 'DISAGREE'}: at most {difference:.1e} nats/token apart on the "
        f"first {min(AGREEING_STEPS, len(first))} steps, {max(abs(a - b) for a, b in first):.1e} on all"
    )
    apart = max(abs(of["final_loss"] - mine["final_loss"]) for of in found.values())
    print(
        f"            after training, those of all are {'FAR APART' if apart > FAR else 'close'} on the last global "
        f"batch: {apart:.1e} nats/token at most"
    )
    if "trl" not in found:
        print("trl         is not installed: pip install trl")
    elif (leak := found["trl"]["leakage"]) is not None:
        print(
            f"trl         packed documents {'SEE EACH OTHER' if leak > LEAK else 'are kept apart'} (logits: {leak:.1e})"
        )
    if parts:
        print("time        " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items() if share >= 0.005))
    others = [name for name in CONTENDERS if name != "ours"]
    ratios = {f"ratio_{n}": found[n]["seconds"] / mine["seconds"] if n in found else None for n in others}
    peaks = {f"ratio_peak_{n}": found[n]["peak_bytes"] / mine["peak_bytes"] if n in found else None for n in others}
    figures = ratios | {
        "peak_bytes": mine["peak_bytes"],
        **peaks,
        "share_of_gemm_limit": limits["own"] / mine["seconds"] if limits else None,
        "share_of_gemm_limit_with_lora": sum(limits.values()) / mine["seconds"] if limits else None,
        "trained_tokens_per_s": mine["trained_tokens_per_s"],
        "loss_difference_hf": difference,
        "final_loss_difference": apart,
        "time": parts,
        "tried": tried,
        "contenders": found,
        "dtype": arguments.dtype,
        "lora": not arguments.full,
        "threads": torch.get_num_threads(),
        "device": where(),
    }
    print(json.dumps(figures))
    return int(arguments.dtype == "float32" and not agree)


def where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, problems=200)
    parser.add_argument("--rows", type=int, default=None, help="trajectories, by chance; none: steps x batch size")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="trajectories of a global batch")
    parser.add_argument("--lr", type=float, default=None, help="none: 1e-4 with LoRA, 1e-5 without")
    parser.set_defaults(full=False)
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--lora", dest="full", action="store_false", help="the default")
    training.add_argument("--full", dest="full", action="store_true", help="train every parameter")
    parser.add_argument("--only", choices=CONTENDERS, help="one contender, in this process; its figures as JSON")
    parser.add_argument("--try-steps", type=int, default=2, help="for each setting of hf_grouped and trl; 0: the usual")
    parser.add_argument("--rounds", type=int, default=1, help="times that all are measured; each one's fastest counts")
    parser.add_argument("--profile", action="store_true", help="also say what our time goes to")
    parser.add_argument("--setting", type=int, default=None, help="with --only: of its micro-batch")
    for name in ("--try", "--parts"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    for name in ("rows", "steps", "batch_size", "rounds"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        data, batches = open_rows(arguments, arguments.cache or Path(temporary))
        first = batches[: max(1, arguments.try_steps)]
        if arguments.parts:
            print(json.dumps(profiled(data, first)))
        elif vars(arguments)["try"]:
            print(json.dumps(fastest(arguments.only, data, first)))
        elif arguments.only:
            print(json.dumps(contend(arguments.only, data, batches, arguments.setting)))
        else:
            raise SystemExit(report(arguments, *compare(arguments, temporary)))


if __name__ == "__main__":
    main()
