"""A loss that needs a teacher: each modality's features have the similarities of the teacher's."""

from torch import nn

from rankloss.losses import TEACHER, base_entries, check_base, combined


class CkaLoss(nn.Module):
    """The trainer's own plus the alignment with a teacher's similarities, :func:`cka`."""

    def __init__(self, base=None, *, gather=None):
        super().__init__()
        self.base = check_base(base, gather)

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        *,
        reference_image_features,
        reference_text_features,
        output_dict=False,
        **more,
    ):
        students, teachers = (
            (image_features, text_features),
            (reference_image_features, reference_text_features),
        )
        teacher = dict(zip(TEACHER, teachers, strict=True))
        entries = base_entries(self.base, *students, logit_scale, teacher=teacher, **more)
        distance = sum(1 - cka(x, y) for x, y in zip(students, teachers, strict=True))
        return combined(entries, {"cka_loss": distance}, output_dict)


def cka(x, y):
    """Linear centred kernel alignment: ``‖XᵀY‖² / (‖XᵀX‖ · ‖YᵀY‖)``, rows without their mean."""
    x, y = (z - z.mean(0) for z in (x, y))
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
