"""DeepSpeed ZeRO-3 with parameters and optimizer state on storage, on overspill's I/O engine.

    python examples/deepspeed/train.py --swap-dir /nvme/swap

trains a small transformer to count. On several processes, start it with `deepspeed` or `torchrun`. What
makes DeepSpeed use overspill are the two lines that say so; `--own` leaves them out, and DeepSpeed compiles its own op.
"""

import argparse
import json
import os
import pathlib

import torch

import overspill.deepspeed  # overspill

VOCABULARY, WIDTH, LAYERS, LENGTH = 256, 512, 2, 32


class Model(torch.nn.Module):
    """A transformer that sees the past only; the answer is its loss."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        states = self.embed(tokens[:, :-1])
        mask = torch.nn.Transformer.generate_square_subsequent_mask(states.shape[1], dtype=states.dtype)
        logits = self.head(self.layers(states, mask=mask, is_causal=True)).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(steps, rank):
    """Sequences that count from anywhere; others on each rank."""
    random = torch.Generator().manual_seed(1000 + rank)
    for _ in range(steps):
        starts = torch.randint(VOCABULARY, (4, 1), generator=random)
        yield (starts + torch.arange(LENGTH)) % VOCABULARY


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--swap-dir", default="swap", help="directory on fast storage")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--own", action="store_true", help="use DeepSpeed's own op")
    parser.add_argument("--in-memory", action="store_true", help="swap nothing")
    parser.add_argument("--losses", help="write the losses of rank 0 to this file, exactly")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.own:
        overspill.deepspeed.install()  # overspill

    # One process needs no launcher.
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    if "RANK" not in os.environ:
        os.environ.update(
            alone | {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
        )
    import deepspeed

    config = json.loads((pathlib.Path(__file__).parent / "ds_config.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        if arguments.in_memory:
            config["zero_optimization"][part] = {"device": "cpu"}
        else:
            config["zero_optimization"][part]["nvme_path"] = arguments.swap_dir
    torch.manual_seed(7)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step, tokens in enumerate(batches(arguments.steps, engine.global_rank), 1):
        loss = engine(tokens.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if engine.global_rank == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    if arguments.losses and engine.global_rank == 0:
        pathlib.Path(arguments.losses).write_text(json.dumps([loss.hex() for loss in losses]))
    engine.destroy()


if __name__ == "__main__":
    main()
