"""A loss with a teacher: each modality's features have the similarities of the teacher's."""

from rankloss.distributed import gather_once
from rankloss.losses import GatheringLoss, base_entries, check_base, check_weight, combined


class CkaLoss(GatheringLoss):
    """The trainer's own plus the alignment with a teacher's similarities, :func:`cka`.

    Args:
        weight: Weight of the term.
    """

    def __init__(self, base=None, *, weight=1.0, gather=None):
        super().__init__(gather)
        self.base = check_base(base, self.gather)
        self.weight = check_weight("weight", weight)

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        logit_bias=None,
        output_dict=False,
        *,
        reference_image_features,
        reference_text_features,
        **base_inputs,
    ):
        teacher = {
            "reference_image_features": reference_image_features,
            "reference_text_features": reference_text_features,
        }
        self.check_inputs(image_features, text_features, logit_scale, **teacher)
        with gather_once():
            students = self.gather(image_features, text_features)
            pairs = zip(students, self.gather.constants(*teacher.values()), strict=True)
            distance = sum(1 - cka(x.float(), y.float()) for x, y in pairs)
            inputs = image_features, text_features, logit_scale, logit_bias
            entries = base_entries(self.base, *inputs, teacher=teacher, **base_inputs)
        return combined(entries, {"cka_loss": self.weight * distance}, output_dict)


def cka(x, y):
    """Linear centred kernel alignment: ``‖XᵀY‖² / (‖XᵀX‖ · ‖YᵀY‖)``, rows without their mean."""
    x, y = (z - z.mean(0) for z in (x, y))
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
