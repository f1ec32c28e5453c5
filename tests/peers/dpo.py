"""DPO by TRL's trainer, from the same SFT checkpoint and pairs as DVPO: what `evaluate.py` compares DVPO with.

    pip install -e '.[peers]'
    python tests/peers/dpo.py --model-path runs/sft --output-dir runs/dpo

Out: a checkpoint that `from_pretrained` and `evaluate.py` load.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import tyro
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
import common  # noqa: E402


@dataclass
class Args:
    model_path: str = "runs/sft"
    """policy and reference: local folder or hub id"""
    dataset: str = "tests/tasks/lists.py"
    """preference pairs"""
    output_dir: str = "runs/dpo"
    """folder of the trained policy"""
    seed: int = 1
    """seed of the data order"""
    num_epochs: int = 3
    """passes over the pairs"""
    batch_size: int = 8
    """pairs per update"""
    learning_rate: float = 3e-4
    """AdamW's peak, decayed linearly to zero after a tenth of warm-up"""
    beta: float = 0.7
    """how strongly the policy is held to the reference"""
    max_length: int = 512
    """tokens of prompt and answer; longer ones are cut"""


def main(args: Args) -> None:
    tokenizer = common.load_tokenizer(args.model_path)
    examples, _ = common.load_examples(args.dataset, needs="pairs")
    turn = lambda text: [{"role": "assistant", "content": text}]
    template = {"chat_template_kwargs": common.TEMPLATE_ARGUMENTS}
    pairs = [{"prompt": e.prompt, "chosen": turn(e.chosen), "rejected": turn(e.rejected), **template} for e in examples]
    config = DPOConfig(
        output_dir=args.output_dir,
        beta=args.beta,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # below 1: a share of all steps
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32)
    trainer = DPOTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()  # with the tokenizer


if __name__ == "__main__":
    with common.one_line_errors():
        main(tyro.cli(Args))
