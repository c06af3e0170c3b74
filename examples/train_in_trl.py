"""Train in TRL on a selection with its weights, which TRL's own trainer ignores."""

import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig

import lark
from lark.trl import WeightedSFTTrainer

student = lark.load_student("tiny")
scores = lark.score(lark.load_pool(task="arithmetic", limit=40), student)
chosen = lark.select(scores, rule="lark", budget=2)

chat = student.load_chat()
tokenizer = chat.tokenizer
tokenizer.chat_template = chat.template  # the one that the trajectories were scored under
trainer = WeightedSFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(str(student.folder), dtype="float32"),
    args=SFTConfig(
        output_dir="trl",
        max_steps=4,
        assistant_only_loss=True,
        max_length=128,
        bf16=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=chosen.to_dataset(),
    processing_class=tokenizer,
)
print(trainer.train().metrics)
