"""Fine-tunes a small transformer whose optimizer state is on storage: a plain PyTorch loop and three lines of overspill.

    python examples/finetune.py [--swap-dir DIR] [--steps N] [--memory SIZE]

The text is made on the spot: sums like ``17+25=42;``. The model is pretrained on sums of single digits, in memory, then
fine-tuned on longer ones. So small a state would stay in memory whole, so ``--resident`` forbids that. With ``--swap-dir``
the state is committed every 50 steps, and stays: the same command goes on from the last commit.
"""

import argparse
import os
import tempfile

import torch
from torch import nn

# Line 1 of 3.
import overspill

CHARACTERS = "0123456789+=; "
LENGTH = 48


class Model(nn.Module):
    """A decoder of two layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(len(CHARACTERS), width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(CHARACTERS))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text.shape[1])
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.layers(self.symbols(text) + self.places(places), mask=mask, is_causal=True)
        return self.head(hidden)


def batch(step: int, limit: int) -> torch.Tensor:
    """Sixteen rows of sums of numbers below ``limit``, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for _ in range(16):
        text = ""
        while len(text) < LENGTH:
            a, b = (int(torch.randint(limit, (), generator=generator)) for _ in range(2))
            text += f"{a}+{b}={a + b};"
        rows.append([CHARACTERS.index(character) for character in text[:LENGTH]])
    return torch.tensor(rows)


def loss_of(model: Model, text: torch.Tensor) -> torch.Tensor:
    logits = model(text[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def pretrained(steps: int = 60) -> Model:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step, limit=5)).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--swap-dir", help="where the state is, to go on from; if not given, one that is removed"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--memory", default="8MiB", help="all the memory that the state may take")
    parser.add_argument("--resident", default="0", help="the most of it that may stay in memory")
    arguments = parser.parse_args()

    model = pretrained()
    with tempfile.TemporaryDirectory() as temporary:
        swap_dir = arguments.swap_dir or os.path.join(temporary, "swap")
        swap = {"swap_dir": swap_dir, "memory": arguments.memory, "resident": arguments.resident}
        begin = 0
        if overspill.AdamW.is_committed(swap_dir):
            optimizer = overspill.AdamW.resume(model.parameters(), **swap)
            begin = optimizer.extra["step"]
        else:
            # Line 2 of 3, instead of torch.optim.AdamW.
            optimizer = overspill.AdamW(model.parameters(), lr=3e-3, **swap)
        for step in range(begin, arguments.steps):
            optimizer.zero_grad()
            loss = loss_of(model, batch(1000 + step, limit=50))
            loss.backward()
            optimizer.step()
            if step % 50 == 49:
                # Line 3 of 3: whatever happens from now on, the run goes on from here.
                optimizer.commit({"step": step + 1})
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
        report = optimizer.report()
        total, resident = report["state_bytes"], report["resident_bytes"]
        print(f"{total} bytes of state on {report['backend']}, {resident} of them in memory")
        optimizer.close()


if __name__ == "__main__":
    main()
