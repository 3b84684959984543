from rankloss.losses import GatheringLoss, base_entries, combined
from rankloss_trainers.named import NamedLoss, option


class SoftLoss(GatheringLoss):
    def __init__(self, base, weight, scale, gather):
        super().__init__(gather)
        self.base, self.weight, self.scale = base, weight, scale

    def forward(self, image_features, text_features, *, reference_text_features, output_dict=False, **more):
        own, (teacher,) = self.gather.items(text_features), self.gather.constants(reference_text_features)
        targets = (self.scale * teacher @ teacher.T).softmax(-1)
        term = -(targets * (self.scale * own @ own.T).log_softmax(-1)).sum(-1).mean()
        entries = base_entries(self.base, image_features, text_features, **more)
        return combined(entries, {"soft_loss": self.weight * term}, output_dict)


class Soft(NamedLoss):
    """The trainer's own plus the softmax of a teacher's similarities of the captions."""

    weight: float = option(1.0, "weight of the term", at_least=0)
    scale: float = option(20.0, "multiplier of the similarities", above=0)
    reference_features: str | None = option(None, "the teacher's features", for_trainer=True)

    def build(self, base, gather):
        return SoftLoss(base, self.weight, self.scale, gather)
