"""The reference that overspill's arithmetic is compared with: `transformers` and `torch`, in fp32 on the CPU.

reference.py make DIR [--tied] [--llama3]   writes a small random Llama with a tokenizer to DIR, and to
                                            DIR/reference.json the logits of a batch and the losses of ten
                                            AdamW steps
reference.py load DIR                       loads a folder as a user would, and prints as JSON the logits of
                                            the text on standard input and its token ids
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB, BATCH, SEQ, ACCUMULATE, STEPS = 300, 2, 24, 2, 10
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-3, 0.1, (0.9, 0.95), 0.5


def make(folder: Path, tied: bool, llama3: bool) -> None:
    torch.manual_seed(7)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if llama3:
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder)

    # Two batches in turns, so that ten steps learn something and a wrong update shows.
    ids = torch.randint(0, VOCAB, (2, ACCUMULATE, BATCH, SEQ)).repeat(STEPS // 2, 1, 1, 1)
    targets = torch.randint(0, VOCAB, (2, ACCUMULATE, BATCH, SEQ)).repeat(STEPS // 2, 1, 1, 1)
    with torch.no_grad():
        logits = model(ids[0, 0]).logits
    reference = {
        "batch": BATCH,
        "seq": SEQ,
        "accumulate": ACCUMULATE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "betas": BETAS,
        "clip": CLIP,
        "ids": ids.flatten(2).tolist(),
        "targets": targets.flatten(2).tolist(),
        "logits": logits.flatten().tolist(),
        "losses": train(model, ids, targets),
    }
    (folder / "reference.json").write_text(json.dumps(reference))


def train(model, ids, targets):
    """Mean loss per token of each step, before its update; matrices decay, gains of norms do not."""
    decaying = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=1e-8)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(ACCUMULATE):
            logits = model(ids[step, micro]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[step, micro].flatten())
            (loss / ACCUMULATE).backward()
            total += loss.item() / ACCUMULATE
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the 256 bytes and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def load(folder: Path) -> None:
    text = sys.stdin.read()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    json.dump({"ids": ids, "logits": logits.flatten().tolist()}, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["make", "load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--llama3", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.action == "make":
        make(arguments.folder, arguments.tied, arguments.llama3)
    else:
        load(arguments.folder)


main()
