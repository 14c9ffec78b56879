"""Trains one model by several recipes of AdamW, and writes what became of the loss: convergence.md and convergence.svg.

Each recipe trains from the same first weights on the same batches, once for each seed, with nothing of the state kept in
memory, so that the bytes that are moved are those of the recipe. The differences in loss are taken between runs of one
seed; how far they differ from seed to seed says how much of them is chance.
"""

import argparse
import json
import math
import subprocess
import tempfile
import textwrap
from pathlib import Path
from statistics import mean, stdev

# What is compared: weights and moments; the first is what the others are compared with.
RECIPES = [
    ("f32", "f32"),
    ("bf16", "f32"),
    ("f32", "bf16"),
    ("f32", "8bit"),
    ("bf16-stochastic", "f32"),
    ("bf16", "8bit"),
]
# Told apart by most people (Okabe and Ito).
COLORS = ["#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"]
MODEL = {"layers": 4, "hidden": 192, "heads": 6}
LAST = 20  # Steps whose mean is the final loss.
SMOOTH = 15  # Steps of the running mean that is drawn.


def arguments():
    parser = argparse.ArgumentParser(prog="bench/convergence/run", description=__doc__.splitlines()[0])
    parser.add_argument("--overspill", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--docs", type=Path, required=True, help="folder that is written to")
    parser.add_argument("--dir", type=Path, default=None, help="directory for the state, on a disk")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run [200]")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each recipe [2]")
    return parser.parse_args()


def train(options, weights, moments, seed, folder):
    report = Path(folder) / "run.json"
    model = [text for name, size in MODEL.items() for text in (f"--{name}", str(size))]
    command = [options.overspill, "train", *model, "--steps", str(options.steps), "--seed", str(seed)]
    command += ["--weights", weights, "--moments", moments, "--resident", "0", "--swap-dir", folder]
    subprocess.run([*command, "--json", report, "--quiet"], check=True)
    return json.loads(report.read_text())


def smooth(values):
    """Running means, from which the first steps are left out."""
    return [mean(values[end - SMOOTH : end]) for end in range(SMOOTH, len(values) + 1)]


def name(recipe):
    return f"{recipe[0]} / {recipe[1]}"


def ticks(low, high, count=5):
    """Round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def panel(curves, title, steps, top, height, dashed_zero=False):
    """One diagram: curves over steps, with axes. The area is 620 wide, from x = 70."""
    left, width = 70, 620
    values = [value for curve in curves for value in curve]
    margin = 0.06 * (max(values) - min(values) or 1.0)
    low, high = min(values) - margin, max(values) + margin

    def x(step):
        return left + width * step / steps

    def y(value):
        return top + height * (high - value) / (high - low)

    parts = [f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>']
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>')
    for value in ticks(low, high):
        label = f"{value:.10g}" if value else "0"
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    for step in ticks(0, steps):
        parts.append(f'<text x="{x(step):.1f}" y="{top + height + 16}" text-anchor="middle">{step:g}</text>')
    for curve, color in zip(curves, COLORS):
        points = " ".join(f"{x(SMOOTH + i):.1f},{y(value):.1f}" for i, value in enumerate(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>')
    return parts


def svg(losses, steps):
    """Losses of all recipes, and what they differ by; means over seeds."""
    means = [smooth([mean(run[step] for run in runs) for step in range(steps)]) for runs in losses]
    differences = [[a - b for a, b in zip(curve, means[0])] for curve in means]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 640" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="720" height="640" fill="white"/>')
    parts += panel(
        means, f"loss (running mean of {SMOOTH} steps, mean of {len(losses[0])} seeds)", steps, 30, 270
    )
    parts += panel(differences, f"loss above that of {name(RECIPES[0])}", steps, 360, 190)
    for index, (recipe, color) in enumerate(zip(RECIPES, COLORS)):
        x, y = 70 + 210 * (index % 3), 600 + 20 * (index // 3)
        parts.append(
            f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{color}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{x + 30}" y="{y}">{name(recipe)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def final(run):
    return mean(run[-LAST:])


def spread(values):
    return f" ± {stdev(values):.4f}" if len(values) > 1 else ""


def signed(value):
    return f"{value:+.4f}".replace("-", "−")


def document(reports, options):
    runs = [[report["losses"] for report in of_seeds] for of_seeds in reports]
    rows = []
    for recipe, of_seeds, losses in zip(RECIPES, reports, runs):
        state = of_seeds[0]["state_bytes"] / of_seeds[0]["parameters"] - 4
        moved = mean(report["bytes_per_parameter_step"] for report in of_seeds)
        written = mean(report["bytes_written_per_step"] / report["parameters"] for report in of_seeds)
        above = [final(ours) - final(theirs) for ours, theirs in zip(losses, runs[0])]
        difference = "" if recipe == RECIPES[0] else signed(mean(above)) + spread(above)
        loss = f"{mean(map(final, losses)):.4f}"
        cells = [recipe[0], recipe[1], f"{state:.1f}", f"{moved:.1f}", f"{written:.1f}", loss, difference]
        rows.append("| " + " | ".join(cells) + " |")
    marks = [step for step in (1, 25, 50, 100, 150, 200, 250, 300, 400, 600, 1000) if step <= options.steps]
    by_step = []
    for recipe, of_seeds in zip(RECIPES, runs):
        cells = [f"{mean(run[step - 1] for run in of_seeds):.4f}" for step in marks]
        by_step.append("| " + " | ".join([name(recipe), *cells]) + " |")
    per_seed = []
    for recipe, of_seeds in zip(RECIPES, runs):
        per_seed.append("| " + " | ".join([name(recipe), *(f"{final(run):.4f}" for run in of_seeds)]) + " |")
    first = reports[0][0]
    seeds = "once" if options.seeds == 1 else f"with {options.seeds} seeds"
    shape = f"{MODEL['layers']} layers, width {MODEL['hidden']}, {first['parameters']:,} parameters"
    explained = (
        "The state is weights and records, as they lie on storage (gradients, four bytes more, are there between two "
        "passes). What is moved includes gradients, layers' inputs and padding. The final loss is the mean of the last "
        f"{LAST} steps and of all seeds; its difference is that of runs of one seed, with the standard deviation over seeds."
    )
    if options.seeds > 1:
        pairs = [
            [final(ours) - final(theirs) for ours, theirs in zip(of_seeds, runs[0])] for of_seeds in runs[1:]
        ]
        always = [name(recipe) for recipe, of_pairs in zip(RECIPES[1:], pairs) if min(of_pairs) > 0]
        explained += (
            f" Above single precision with every seed: {', '.join(always) or 'none'}. With {options.seeds} seeds, a mean "
            "that is not well above its deviation says nothing either way."
        )
    explained = textwrap.fill(explained, 120)
    return f"""# What the formats of the state cost in loss

The state of a run can be stored in fewer bits, so that fewer bytes are moved: `overspill train --weights --moments`. Here
is what becomes of the loss, and of the bytes. `bench/convergence/run` measures it and writes this page.

One model ({shape}) is trained by AdamW for {options.steps} steps, {seeds}, on overspill's own
documents and sources, byte by byte, with all other arguments at their defaults. Runs of one seed have the same first
weights and the same batches. Nothing of the state stays in memory (`--resident 0`), so all of it is moved in every step.

![losses of all recipes, and their differences](convergence.svg)

| weights | moments | state, bytes per parameter | moved per parameter and step | of which written | final loss | above f32 / f32 |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{explained}

- `bf16` weights are what the model computes with, so its arithmetic is another; the optimizer's exact weights come back
  from them and 16 bits in the record.
- `bf16-stochastic` weights have no exact form anywhere: each update is rounded at random, up as often as the rest says.
- `8bit` moments are blocks of 256 with a scale each, after the block-wise quantization of Dettmers et al., [8-bit Optimizers
  via Block-wise Quantization](https://arxiv.org/abs/2110.02861) (2021), who find the results of 32-bit Adam on language
  models of up to 1.5 billion parameters. Ours differ from theirs: blocks are shorter (256 instead of 2048), the code is
  a small floating-point format, and rounding is at random.

A model of this size trained this briefly shows what goes wrong at once (moments that stall, weights that swallow small
updates); it does not show what {options.steps} steps are too few for, or what only large models do.

## Losses

By step, the mean of all seeds, one step each:

| weights / moments | {" | ".join(map(str, marks))} |
|---|{"---|" * len(marks)}
{chr(10).join(by_step)}

The final loss, seed by seed:

| weights / moments | {" | ".join(f"seed {seed}" for seed in range(options.seeds))} |
|---|{"---|" * options.seeds}
{chr(10).join(per_seed)}
"""


def main():
    options = arguments()
    reports = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for weights, moments in RECIPES:
            of_seeds = []
            for seed in range(options.seeds):
                print(f"{weights} / {moments}, seed {seed}", flush=True)
                of_seeds.append(train(options, weights, moments, seed, folder))
            reports.append(of_seeds)
    losses = [[report["losses"] for report in of_seeds] for of_seeds in reports]
    (options.docs / "convergence.md").write_text(document(reports, options))
    (options.docs / "convergence.svg").write_text(svg(losses, options.steps))
    for recipe, runs in zip(RECIPES, losses):
        print(f"{name(recipe):24} {mean(map(final, runs)):.4f}")


main()
