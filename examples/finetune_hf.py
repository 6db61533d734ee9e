"""Fine-tune a Hugging Face model on a text file, and save it as a folder that `from_pretrained` loads.

python examples/finetune_hf.py --model HuggingFaceTB/SmolLM2-135M --text my.txt --out runs/tuned
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttrain import TrainConfig, Trainer


def batches(tokenizer, text: str, length: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The text in windows of `length` tokens, nine in ten for training. Any loader of Hugging Face batches will do."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    windows = [{"input_ids": row, "labels": row} for row in rows]
    split = max(1, len(windows) * 9 // 10)
    return (DataLoader(windows[:split], batch_size=batch_size, shuffle=True),
            DataLoader(windows[split:] or windows[:1], batch_size=batch_size))


def main(model: str, text: Path, out: Path, steps: int, length: int, batch_size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    train, val = batches(tokenizer, text.read_text(encoding="utf-8"), length, batch_size)
    config = TrainConfig(max_steps=steps, lr=5e-5, warmup_steps=0.1, schedule="linear", eval_at_start=True)
    trainer = Trainer(model=network, train_dataloader=train, val_dataloader=val, config=config, tokenizer=tokenizer,
                      checkpoint_dir=out / "checkpoints", use_amp=True)
    result = trainer.train()
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    print(f"validation loss {result.val_loss:.3f}; saved to {out / 'model'}")
    print(trainer.generate_text("The", max_new_tokens=20, temperature=0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name on the hub or a folder")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints and the model go")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a batch")
    main(**vars(parser.parse_args()))
