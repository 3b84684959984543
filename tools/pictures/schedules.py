"""The schedules: how λ moves over training."""

from __future__ import annotations

from matplotlib.figure import Figure
from style import WIDTH, Colors

from rankloss import schedules

EPOCHS = 64


def draw(colors: Colors) -> Figure:
    """λ of every schedule over the epochs of a training, named at the line."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    looks = {  # colour, line, where the name stands
        "rankclip": (colors.ours, "-", (26, 1.28), "right"),
        "official": (colors.bad, "--", (32, 1.28), "left"),
        "constant": (colors.other, "-", (1, 1.07), "left"),
        "linear": (colors.text, "-", (43, 0.5), "left"),
        "cosine": (colors.text, ":", (24, 0.12), "left"),
    }
    assert looks.keys() == set(schedules.NAMES)
    epochs = range(1, EPOCHS + 1)
    for name, (color, line, place, alignment) in looks.items():
        values = [schedules.by_name(name)(i, EPOCHS) for i in epochs]
        axes.plot(epochs, values, line, color=color)
        axes.text(*place, name, color=color, ha=alignment, weight="bold" if name == "rankclip" else "normal")
    axes.set(xlabel=f"epoch of {EPOCHS}", ylabel="schedule's value", xlim=(1, EPOCHS), ylim=(0, 2.1))
    axes.set_xticks([1, 16, 32, 48, 64])
    axes.set_yticks([0, 0.5, 1, 1.5, 2])
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure
