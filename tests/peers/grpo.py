"""GRPO by TRL's trainer, from the same SFT checkpoint, prompts and reward model as the PPO baseline.

Answers that were cut are scored where they stop, as DVPO does, without PPO's --missing-eos-penalty.

    pip install -e '.[peers]'
    python train_ppo_baseline.py                                         # leaves the reward model in runs/rm
    python tests/peers/grpo.py --model-path runs/sft --reward-path runs/rm --output-dir runs/grpo

Out: a checkpoint that `from_pretrained` and `evaluate.py` load.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import tyro
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
import common  # noqa: E402
from train_ppo_baseline import token_values  # noqa: E402


@dataclass
class Args:
    model_path: str = "runs/sft"
    """policy and reference: local folder or hub id"""
    reward_path: str = "runs/rm"
    """sequence-classification reward model: local folder or hub id"""
    dataset: str = "tests/tasks/lists.py"
    """where the prompts come from"""
    output_dir: str = "runs/grpo"
    """folder of the trained policy"""
    seed: int = 1
    """seed of prompt order and sampling"""
    num_updates: int = 300
    """rollouts"""
    rollout_batch_size: int = 64
    """answers per update"""
    num_generations: int = 8
    """answers to the same prompt: the group whose mean is the baseline"""
    num_epochs: int = 2
    """passes over each rollout"""
    num_minibatches: int = 2
    """optimizer steps per pass"""
    learning_rate: float = 6e-4
    """AdamW's, decayed linearly to zero"""
    beta: float = 0.04
    """weight of the KL to the reference"""
    response_length: int = 20
    """tokens; longer answers are cut"""


def main(args: Args) -> None:
    whole = args.rollout_batch_size % args.num_minibatches == 0
    common.check(whole, "--rollout-batch-size must be a multiple of --num-minibatches")
    tokenizer = common.load_tokenizer(args.model_path)
    examples, _ = common.load_examples(args.dataset, needs="prompts")
    prompts = [{"prompt": e.prompt} for e in {str(e.prompt): e for e in examples}.values()]
    config = GRPOConfig(
        output_dir=args.output_dir,
        beta=args.beta,
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        max_steps=args.num_updates * args.num_epochs * args.num_minibatches,
        per_device_train_batch_size=args.rollout_batch_size // args.num_minibatches,
        steps_per_generation=args.num_minibatches,
        num_iterations=args.num_epochs,
        num_generations=args.num_generations,
        max_completion_length=args.response_length,
        temperature=1.0,
        top_k=0,
        chat_template_kwargs=common.TEMPLATE_ARGUMENTS,
        seed=args.seed,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        logging_steps=10 * args.num_epochs * args.num_minibatches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rm = common.load_value_model(args.reward_path, tokenizer, torch.float32, fresh_head=False)
    rm = rm.eval().to(config.device)

    @torch.no_grad()
    def score(prompts, completion_ids, **_):
        """The RM's. Given the RM itself, TRL looks for an answer's end by token id, and EOS may be padding, too."""
        prompt_ids = [common.tokenize_prompt(tokenizer, prompt) for prompt in prompts]
        batch = common.pad_batch(prompt_ids, completion_ids, tokenizer.pad_token_id, config.device)
        return common.last_values(token_values(rm, **batch), batch["response_mask"]).tolist()

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32),
        reward_funcs=score,
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # with the tokenizer


if __name__ == "__main__":
    with common.one_line_errors():
        main(tyro.cli(Args))
