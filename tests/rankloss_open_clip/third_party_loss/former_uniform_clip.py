"""The same loss, registered as for rankloss 0.1: the functions take the trainer's arguments."""

from uniform_clip import LoggedUniformLoss

from rankloss_open_clip.registry import LossEntry, Option, weight

UNIFORM = LossEntry(
    build=lambda base, args: LoggedUniformLoss(base, weight=args.uniform_former_weight),
    help="the trainer's own plus a uniformity term",
    options=(Option("weight", 0.1, "weight of the term", {"type": weight, "metavar": "X"}),),
    refuse=lambda args: "uniform needs at least three pairs" if args.batch_size < 3 else None,
    describe=lambda args: f"weight up to {args.uniform_former_weight:g}",
    unit=lambda args: "step",
)
