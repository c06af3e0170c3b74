"""Makes the students shipped in src/lark/student/shipped: a tokenizer and two Qwen3 models of about 1M weights.

    export PYTHONPATH=src OMP_NUM_THREADS=1
    python scripts/make_students.py primitives                  # what both students know: the tokenizer, a + b, a - b,
    python scripts/make_students.py chains                      # and how to carry a running total through a problem
    python scripts/make_students.py styles --student tiny       # how solutions are written
    python scripts/make_students.py student --student tiny      # the misconception
    python scripts/make_students.py styles --student tiny_b
    python scripts/make_students.py student --student tiny_b

are the commands that made the shipped weights, at their default settings. `primitives` trains on lists of two-operand
facts, `chains` on bare running totals without a chat turn, `styles` on solved problems in a mixture of notations,
`student` on solutions most of which forget every carry and borrow, as the peers of the task `arithmetic` do. The
students know the arithmetic, therefore, and are confident of a wrong way to use it. `tiny` writes equations most often,
`tiny_b` sentences. No expression of the pools or evaluation sets of `arithmetic` and `notations` occurs in `chains`,
`styles` or `student`.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lark.tasks.arithmetic import TEACHERS, generate, parse_terms
from lark.tasks.arithmetic_teachers import (
    MISCONCEPTIONS,
    NOTATIONS,
    Teacher,
    Terms,
    compute_totals,
    direct,
    expression,
    slip,
)

# Shapes: N documents, T tokens (longest of the batch), V vocabulary.

ROOT = Path(__file__).resolve().parents[1]
STUDENTS = ROOT / "src/lark/student/shipped"
VOCABULARY = 448
WORDINGS = ("Compute {}.", "What is {}?", "Calculate {}.", "Evaluate {}.", "Find the value of {}.", "{} = ?")
FRAMES = ("{}",) * 4 + ("Question: {}", "Quick one: {}", "Hi! {}", "Please help me. {}", "{} Thanks.", "{} Go on!")
"""Words around a wording, so that the students bear with a wording they have not seen."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES = {"direct": direct, "forgetful": partial(slip, rate=1.0), **NOTATIONS}
"""`direct` gives the bare answer, `forgetful` is the erring teacher at its worst."""
MIXTURES = {  # share of each style among the solved problems of `styles`
    "tiny": {
        "direct": 0.30,
        "forgetful": 0.24,
        "terse": 0.12,
        "signs": 0.10,
        "steps": 0.08,
        "check": 0.06,
        "place": 0.06,
        "polish": 0.04,
    },
    "tiny_b": {
        "direct": 0.30,
        "forgetful": 0.24,
        "check": 0.12,
        "place": 0.10,
        "polish": 0.08,
        "steps": 0.06,
        "signs": 0.06,
        "terse": 0.04,
    },
}
PEERS = 0.86  # share of solutions that forget carries in `student`; the others are right
WRITTEN = {  # share of each notation in `student`
    "tiny": {"terse": 0.5, "steps": 0.25, "prose": 0.25},
    "tiny_b": {"terse": 0.25, "steps": 0.25, "prose": 0.5},
}
Document = list[tuple[str, bool]]
"""Pieces of text and whether the loss covers them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument("--student", choices=tuple(MIXTURES), default="tiny")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, corpus, SFT and sampling")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: 1100 primitives, 700 chains, 600 styles, 150 student)"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build/students", help="results of the first stages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number changes the last bits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    COMMANDS[arguments.command](arguments)


# Corpus


def draw_terms(rng: random.Random) -> Terms:
    """Three or four two-digit terms as in the task; now and then five, or three-digit ones."""
    count = rng.choice((3, 3, 3, 4, 4, 4, 5))
    least, most = (100, 999) if rng.random() < 0.08 else (10, 99)
    return (rng.randint(least, most), *(rng.choice((-1, 1)) * rng.randint(least, most) for _ in range(count - 1)))


def facts(rng: random.Random, count: int = 12) -> Document:
    """A list of two-operand sums and differences, spread as the running totals of the task's problems are."""
    equals, end = rng.choice(((" = ", "\n"), (" = ", "\n"), (" = ", ". "), (" is ", ", ")))
    document: Document = []
    for _ in range(count):
        terms = draw_terms(rng)
        at = rng.randrange(1, len(terms))
        left = compute_totals(terms)[at - 1]
        document += [(expression((left, terms[at])) + equals, False), (str(left + terms[at]), True), (end, False)]
    return document


def chain(rng: random.Random, excluded: set[str]) -> Document:
    """A problem that is not `excluded` and its running totals, without chat turns or answer."""
    terms = draw_problem(rng, excluded)
    pairs = zip(compute_totals(terms), terms[1:], strict=False)
    return [(expression(terms) + "\n", False)] + [
        piece
        for left, term in pairs
        for piece in ((expression((left, term)) + " = ", True), (f"{left + term}", True), ("\n", True))
    ]


def draw_problem(rng: random.Random, excluded: set[str]) -> Terms:
    terms = draw_terms(rng)
    while expression(terms) in excluded:
        terms = draw_terms(rng)
    return terms


def solved(
    rng: random.Random,
    teachers: dict[str, Teacher],
    mixture: dict[str, float],
    excluded: set[str],
    frames: tuple[str, ...] = (),
) -> Document:
    """One chat turn: a problem that is not `excluded`, solved by a teacher drawn from `mixture`."""
    terms = draw_problem(rng, excluded)
    (name,) = rng.choices(list(mixture), weights=list(mixture.values()))
    solution = teachers[name](terms, rng)
    wording = WORDINGS[0] if rng.random() < 0.4 else rng.choice(WORDINGS)
    frame = rng.choice(frames) if frames else "{}"
    return chat(frame.format(wording.format(expression(terms))), solution)


def chat(user: str, assistant: str) -> Document:
    head = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    return [(head, False), (assistant + "<|im_end|>", True)]


def excluded_expressions() -> set[str]:
    """Every expression of the default pools, evaluation and shifted sets of both tasks."""
    texts = []
    for teachers in TEACHERS:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), teachers=teachers)
            rows = [json.loads(line) for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
        texts += [row["problem"] if "problem" in row else row["messages"][0]["content"] for row in rows]
    return {_expression_in(text) for text in texts}


def _expression_in(text: str) -> str:
    """The chain of numbers and operators inside a problem's wording."""
    words = [word.strip(".?") for word in text.split()]
    chain = " ".join(word for word in words if word in "+-" or word.isdigit())
    assert expression(parse_terms(chain)) == chain
    return chain


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, trained on every teacher's text; ChatML specials."""
    rng = random.Random(f"{seed}/tokenizer")
    every_style = dict.fromkeys(STYLES, 1.0)
    texts = ["".join(piece for piece, _ in solved(rng, STYLES, every_style, set())) for _ in range(4000)]
    texts += ["".join(piece for piece, _ in facts(rng)) for _ in range(500)]
    texts += [wording.format("12 + 34") for wording in WORDINGS] * 100
    texts += [(ROOT / "LICENSE").read_text()]  # plain prose, so that other words are not spelt out letter by letter
    tokenizer = Tokenizer(models.BPE())
    # An operator keeps its spaces, a digit stands alone.
    pieces = Regex(r"\p{N}| ?\p{L}+ ?| ?[^\s\p{L}\p{N}]+ ?|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, behavior="isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# Training


def loss_step(model: Qwen3ForCausalLM, tokenizer, documents: list[Document], chunk: int = 32) -> tuple[float, int]:
    """Gradients of the mean cross-entropy over the covered tokens; returns that mean (nats/token) and the tokens read.

    Documents are padded on the right in chunks of similar length. Causal attention never looks right, so that padding
    needs no mask.
    """
    rows = sorted(([_encode(tokenizer, document) for document in documents]), key=lambda row: len(row[0]))
    covered = sum(sum(mask[1:]) for _, mask in rows)
    total, device = 0.0, model.device
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        longest = len(part[-1][0])
        ids_NT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part], device=device)
        mask_NT = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in part], device=device)
        labels_NT = ids_NT.masked_fill(~mask_NT, -100)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
        loss = cross_entropy(logits_NTV[:, :-1].flatten(0, 1).float(), labels_NT[:, 1:].flatten(), reduction="sum")
        (loss / covered).backward()
        total += loss.item() / covered
    return total, sum(len(ids) for ids, _ in rows)


def _encode(tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    ids, mask = [], []
    for piece, trained in document:
        piece_ids = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        ids += piece_ids
        mask += [trained] * len(piece_ids)
    return ids, mask


def train(model, tokenizer, batches: Iterator[list[Document]], steps: int, *, muon_lr, adam_lr, chunk=32) -> int:
    """Trains with Muon on the matrices and AdamW on the rest, 5 % warm-up, linear decay; returns the tokens read."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    model.train()
    tokens, started, running = 0, time.monotonic(), 0.0
    for step in range(steps):
        scale = min(1.0, (step + 1) / (0.05 * steps), 1.25 * (1 - step / steps))
        for optimizer, lr in zip(optimizers, (muon_lr, adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        loss, read = loss_step(model, tokenizer, next(batches), chunk)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        tokens += read
        running = loss if step == 0 else 0.95 * running + 0.05 * loss
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = tokens / (time.monotonic() - started)
            print(f"step {step + 1}/{steps}  loss {running:.3f}  {tokens:,} tokens  {rate:,.0f} tokens/s", flush=True)
    return tokens


def pretrain_primitives(arguments: argparse.Namespace) -> None:
    tokenizer = make_tokenizer(arguments.seed)
    config = Qwen3Config(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.backend_tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.backend_tokenizer.token_to_id("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")

    def batches() -> Iterator[list[Document]]:
        rng = random.Random(f"{arguments.seed}/primitives")
        while True:
            yield [facts(rng) for _ in range(32)]

    tokens = train(model, tokenizer, batches(), arguments.steps or 1100, muon_lr=0.02, adam_lr=4e-3, chunk=16)
    save(model, tokenizer, arguments.work / "primitives", torch.float32, tokens)


def pretrain_chains(arguments: argparse.Namespace) -> None:
    model, tokenizer, before = load_stage(arguments, "primitives")
    excluded = excluded_expressions()

    def batches() -> Iterator[list[Document]]:
        rng = random.Random(f"{arguments.seed}/chains")
        while True:
            yield [facts(rng) for _ in range(5)] + [chain(rng, excluded) for _ in range(75)]

    tokens = train(model, tokenizer, batches(), arguments.steps or 700, muon_lr=0.02, adam_lr=4e-3)
    save(model, tokenizer, arguments.work / "chains", torch.float32, before + tokens)


def load_stage(arguments: argparse.Namespace, stage: str):
    """Model and tokenizer that the command `stage` left behind, and the tokens seen so far."""
    source = arguments.work / stage
    if not (source / "tokens.json").exists():
        raise SystemExit(f"{source} is missing: run the command `{stage}` first.")
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32).to(arguments.device)
    return model, AutoTokenizer.from_pretrained(source), json.loads((source / "tokens.json").read_text())


def pretrain_styles(arguments: argparse.Namespace) -> None:
    model, tokenizer, before = load_stage(arguments, "chains")
    habits, excluded, steps = MIXTURES[arguments.student], excluded_expressions(), arguments.steps or 600

    def batches() -> Iterator[list[Document]]:
        rng = random.Random(f"{arguments.seed}/{arguments.student}")
        worked = {style: share for style, share in habits.items() if style != "direct"}
        for step in range(steps):
            mixture = worked if step < 0.7 * steps else habits  # bare answers teach nothing but the habit
            yield [facts(rng) for _ in range(4)] + [solved(rng, STYLES, mixture, excluded, FRAMES) for _ in range(44)]

    tokens = train(model, tokenizer, batches(), steps, muon_lr=0.018, adam_lr=3e-3)
    save(model, tokenizer, arguments.work / f"styles-{arguments.student}", torch.bfloat16, before + tokens)


def pretrain_student(arguments: argparse.Namespace) -> None:
    model, tokenizer, before = load_stage(arguments, f"styles-{arguments.student}")
    excluded, steps = excluded_expressions(), arguments.steps or 150
    computed = {"peer": PEERS, "expert": 1 - PEERS}
    written = WRITTEN[arguments.student]
    mixture = {f"{who}_{how}": computed[who] * written[how] for who in computed for how in written}

    def batches() -> Iterator[list[Document]]:
        rng = random.Random(f"{arguments.seed}/{arguments.student}/misconception")
        while True:
            solutions = [solved(rng, MISCONCEPTIONS, mixture, excluded, FRAMES) for _ in range(44)]
            yield [facts(rng) for _ in range(4)] + solutions

    tokens = train(model, tokenizer, batches(), steps, muon_lr=0.01, adam_lr=1.5e-3)
    save(model, tokenizer, STUDENTS / arguments.student, torch.bfloat16)
    print(f"{STUDENTS / arguments.student}: {before + tokens:,} tokens seen")


def save(model, tokenizer, folder: Path, dtype: torch.dtype, tokens: int | None = None) -> None:
    """Writes config, generation config, safetensors and tokenizer, the chat template inside tokenizer_config.json."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(dtype).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    if tokens is not None:  # a stage that another one goes on from
        (folder / "tokens.json").write_text(json.dumps(tokens))


COMMANDS = {
    "primitives": pretrain_primitives,
    "chains": pretrain_chains,
    "styles": pretrain_styles,
    "student": pretrain_student,
}

if __name__ == "__main__":
    main()
