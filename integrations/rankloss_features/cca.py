"""Regularised canonical correlation analysis: one space from the features of two encoders, in closed form.

::

    cca = CanonicalCorrelation.fit(image_features, text_features)
    scores = cca.images(new_images) @ cca.texts(new_texts).T

To try many settings, gather the sums once, and let :func:`search` rank held-out pairs::

    sums = [PairSums.of(image_features, text_features, root=root) for root in (False, True)]
    trials = search(sums, held_out_images, held_out_texts)
    cca = CanonicalCorrelation.fit(image_features, text_features, **trials[0].setting.as_options())
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import first_equal
from rankloss.checks import check_device, check_is_tensor, check_matrix
from rankloss.metrics.retrieval import Ids, check_partners, id_numbers
from rankloss.options import check_count, check_weight
from rankloss.precision import arithmetic_dtype, can_be_read, has_float64, product

Rows: TypeAlias = Tensor | Iterable[Tensor]
"""Rows of features: a tensor, or blocks of it one after the other."""

FEWEST = 3
"""The fewest pairs that projections are fitted to."""

_BLOCK = 2**22  # numbers that are converted to float64 together, 32 MB
_logger = logging.getLogger("rankloss_features")


@dataclass(frozen=True)
class Setting:
    """A setting of :meth:`CanonicalCorrelation.fit`, which explains these options.

    Raises:
        ValueError: An option is out of its range.
    """

    image_ridge: float = 1.0
    text_ridge: float = 1.0
    dimensions: int = 256
    power: float = 1.0
    root: bool = False

    def __post_init__(self) -> None:
        for name in ("image_ridge", "text_ridge", "power"):
            check_weight(name, getattr(self, name))
        check_count("dimensions", self.dimensions)
        if not isinstance(self.root, bool):
            raise ValueError(f"root must be True or False; got {self.root!r}")

    def as_options(self) -> dict[str, Any]:
        """The keyword arguments of :meth:`CanonicalCorrelation.fit`."""
        return asdict(self)


def unit_features(x: Tensor, *, root: bool) -> Tensor:
    """Rows divided by their norms, in float64; with ``root`` those of sign(x)·√|x| in place of x.

    A row of zeros becomes NaN.

    Example:
        >>> unit_features(torch.tensor([[9.0, -16.0]]), root=True)
        tensor([[ 0.6000, -0.8000]], dtype=torch.float64)
    """
    x = x.detach().to(torch.float64)
    return F.normalize(x.sign() * x.abs().sqrt() if root else x, dim=-1, eps=0.0)


class PairSums:
    """The means and covariances of pairs, gathered in blocks of rows: all that a fit needs of them.

        μ_v = mean_i v_i,     C_vv = mean_i (v_i − μ_v)(v_i − μ_v)ᵀ
        μ_t = mean_is t_is,   C_tt = mean_is (t_is − μ_t)(t_is − μ_t)ᵀ
        C_vt = mean_i (v_i − μ_v)(mean_s t_is − μ_t)ᵀ

    v_i and t_is are unit-norm rows: picture i, and caption s of its S captions. Memory is D² + D'² + D·D' in
    float64, whatever the number of pairs. Each block is centred by its own means before it is added (Chan et
    al. 1983), so nothing is lost to large means.

    Args:
        root: Take sign(x)·√|x| of the features first.

    Example:
        >>> sums = PairSums()
        >>> for block in torch.randn(3, 100, 8).unbind():
        ...     _ = sums.add(block, block[:, :4])
        >>> sums.pairs, sums.image_covariance.shape
        (300, torch.Size([8, 8]))
    """

    def __init__(self, *, root: bool = False) -> None:
        self.root = root
        self.pairs = 0
        self.image_mean = self.text_mean = torch.zeros(0)
        self.image_covariance = self.text_covariance = self.cross_covariance = torch.zeros(0, 0)

    @property
    def widths(self) -> tuple[int, int]:
        """D of the images and of the texts."""
        return len(self.image_covariance), len(self.text_covariance)

    @classmethod
    def of(cls, image_features: Rows, text_features: Rows, *, root: bool = False) -> PairSums:
        """The sums of all pairs, of tensors or of blocks, as :meth:`CanonicalCorrelation.fit` takes them.

        Raises:
            TypeError: Rows are no tensors.
            ValueError: As :meth:`add`, or the numbers of blocks differ.
        """
        sums = cls(root=root)
        for images, texts in _blocks(image_features, text_features):
            sums.add(images, texts)
        return sums

    @torch.no_grad()
    def add(self, image_features: Tensor, text_features: Tensor) -> PairSums:
        """Add pairs, and return itself.

        Args:
            image_features: ``[n, D]``.
            text_features: ``[n, D']``, or ``[n, S, D']``, S captions of each picture.

        Raises:
            TypeError: Features are no tensors.
            ValueError: Their shapes do not fit each other or the pairs before, or a row has NaN or infinity,
                or is zero.
        """
        check_pairs(image_features, text_features)
        if self.pairs:
            self.check_widths(image_features, text_features)
        captions = text_features if text_features.dim() == 3 else text_features[:, None]
        features_of_captions = captions.shape[1] * captions.shape[2]  # of one picture
        rows = max(1, _BLOCK // max(1, image_features.shape[1], features_of_captions))
        for images, texts in zip(image_features.split(rows), captions.split(rows), strict=True):
            if len(images):
                self._merge(_sums_of_block(images, texts, self.root))
        return self

    def check_widths(self, image_features: Tensor, text_features: Tensor) -> None:
        """Raise a ValueError for features of other widths than those of the sums."""
        named = (("image_features", image_features), ("text_features", text_features))
        for (name, x), width in zip(named, self.widths, strict=True):
            if x.shape[-1] != width:
                raise ValueError(
                    f"{name} must have the {width} columns of the pairs before; got shape {tuple(x.shape)}"
                )

    def merged(self, other: PairSums) -> PairSums:
        """The sums of the pairs of both.

        Raises:
            ValueError: One took the root, the other did not, or their features have other widths.
        """
        if self.root != other.root:
            raise ValueError(f"other must have root={self.root}; got root={other.root}")
        if self.pairs and other.pairs and self.widths != other.widths:
            raise ValueError(f"other must be of features of widths {self.widths}; got {other.widths}")
        both = PairSums(root=self.root)
        for sums in (self, other):
            if sums.pairs:
                both._merge(sums)
        return both

    def _merge(self, other: PairSums) -> None:
        """Add the pairs of another: the mean of covariances, and the covariance of the two means.

        With p the share of the other's pairs, μ' and C' its sums, and Δ = μ' − μ of each modality::

            μ ← μ + p·Δ,   C_ab ← (1 − p)·C_ab + p·C'_ab + p·(1 − p)·Δ_a Δ_bᵀ
        """
        if not self.pairs:  # there is nothing to add to
            vars(self).update(vars(other))
            return
        pairs = self.pairs + other.pairs
        share = other.pairs / pairs
        image_shift = other.image_mean - self.image_mean
        text_shift = other.text_mean - self.text_mean

        def joined(C: Tensor, C_other: Tensor, shift_a: Tensor, shift_b: Tensor) -> Tensor:
            """The second line of the formula, of modalities a and b."""
            return torch.lerp(C, C_other, share).addr_(shift_a, shift_b, alpha=share * (1 - share))

        self.image_covariance = joined(
            self.image_covariance, other.image_covariance, image_shift, image_shift
        )
        self.text_covariance = joined(self.text_covariance, other.text_covariance, text_shift, text_shift)
        self.cross_covariance = joined(self.cross_covariance, other.cross_covariance, image_shift, text_shift)
        self.image_mean = self.image_mean + share * image_shift
        self.text_mean = self.text_mean + share * text_shift
        self.pairs = pairs


def _sums_of_block(images: Tensor, texts: Tensor, root: bool) -> PairSums:
    """The sums of one block of pairs.

    Args:
        images: ``[n, D]``.
        texts: ``[n, S, D']``, S captions of each picture.
        root: Take sign(x)·√|x| of the features first.
    """
    v, t = unit_features(images, root=root), unit_features(texts, root=root)
    sums = PairSums(root=root)
    sums.pairs = len(v)
    sums.image_mean, sums.text_mean = v.mean(0), t.mean((0, 1))
    v, t = v - sums.image_mean, t - sums.text_mean
    captions = t.flatten(0, 1)
    sums.image_covariance = v.T @ v / len(v)
    sums.text_covariance = captions.T @ captions / len(captions)
    sums.cross_covariance = v.T @ t.mean(1) / len(v)
    return sums


def _blocks(image_features: Rows, text_features: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of images with their texts; two tensors are one block.

    Raises:
        TypeError: One is a tensor, the other is not.
        ValueError: The numbers of blocks differ.
    """
    are_tensors = isinstance(image_features, Tensor), isinstance(text_features, Tensor)
    if all(are_tensors):
        yield image_features, text_features  # type: ignore[misc]
        return
    if any(are_tensors):
        raise TypeError("image_features and text_features must be both tensors or both blocks of rows")
    for images, texts in itertools.zip_longest(image_features, text_features):
        if images is None or texts is None:
            raise ValueError("image_features and text_features must have equally many blocks of rows")
        yield images, texts


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Check the features of pairs that are fitted.

    Args:
        image_features: ``[n, D]``.
        text_features: ``[n, D']``, or ``[n, S, D']``, S captions of each picture.

    Raises:
        TypeError: Features are no tensors.
        ValueError: Their shapes do not fit each other; they are on two devices, or on one without float64 or
            without values; or a row has NaN or infinity, or is zero.
    """
    check_matrix("image_features", image_features)
    check_is_tensor("text_features", text_features)
    captions = text_features.flatten(0, 1) if text_features.dim() == 3 else text_features
    check_matrix("text_features", captions)
    if len(image_features) != len(text_features) or text_features.shape[1] == 0:
        raise ValueError(
            "image_features and text_features must have one row per pair, texts [N, D'] or [N, S, D']; got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    check_device("text_features", text_features, image_features)
    if not has_float64(image_features.device):
        raise ValueError(
            f"image_features must be on a device with float64; got {image_features.device}: use .cpu()"
        )
    for name, x in (("image_features", image_features), ("text_features", text_features)):
        check_rows(name, x)


def check_rows(name: str, x: Tensor, numbers: Sequence[int] | None = None) -> None:
    """Raise a ValueError unless all rows are finite and none is zero; on the meta device no values are known.

    Args:
        name: The features' name.
        x: ``[n, D]`` or ``[n, S, D]``.
        numbers: ``[n]``, the number by which the error names each row; None: its place in x.
    """
    if not can_be_read(x):
        raise ValueError(f"{name} must have values; got a tensor on the device {x.device}")
    for is_good, demand, defect in (
        (x.isfinite().all(-1), "be finite", "NaN or infinity"),
        (x.any(-1), "have a direction", "zeros alone"),
    ):
        if not bool(is_good.all()):
            place = (~is_good).nonzero()[0].tolist()  # the row, and of several captions the caption's place
            if numbers is not None:
                place[0] = int(numbers[place[0]])
            raise ValueError(f"{name} must {demand}; row {', '.join(map(str, place))} has {defect}")


class _Side(NamedTuple):
    """The eigenvectors of a modality's covariance C that have variance.

    Attributes:
        name: ``image`` or ``text``, for errors.
        vectors: Q, ``[D, rank of C]``.
        variances: The eigenvalues of C to these, in units of the mean variance.
        mean_variance: tr(C)/D.
    """

    name: str
    vectors: Tensor
    variances: Tensor
    mean_variance: float

    def weights(self, ridge: float) -> Tensor:
        """The eigenvalues of W = (C + ridge·tr(C)/D·I)^−½ to the vectors of :attr:`vectors`."""
        return ((self.variances + ridge) * self.mean_variance).rsqrt()


class Eigenbases:
    """The eigenvectors of C_vv and C_tt, which serve all ridges, dimensions and powers.

    Args:
        sums: The sums of the pairs.

    Raises:
        ValueError: There are fewer than three pairs, or all rows of a modality are equal.
    """

    def __init__(self, sums: PairSums) -> None:
        if sums.pairs < FEWEST:
            raise ValueError(
                f"image_features and text_features must be at least {FEWEST} pairs; got {sums.pairs}"
            )
        self.sums = sums
        self._images = _side("image", sums.image_covariance)
        self._texts = _side("text", sums.text_covariance)
        self._cross = self._images.vectors.T @ sums.cross_covariance @ self._texts.vectors  # Q_vᵀ C_vt Q_t

    @property
    def most_dimensions(self) -> int:
        """The width of the narrower features."""
        return min(self.sums.cross_covariance.shape)

    def fit(self, setting: Setting) -> CanonicalCorrelation:
        """The projections of one setting, as :meth:`CanonicalCorrelation.fit`.

        Raises:
            ValueError: As there, or the sums have another ``root``.
        """
        if setting.root != self.sums.root:
            raise ValueError(f"setting must have root={self.sums.root} as the sums; got {setting}")
        if setting.dimensions > self.most_dimensions:
            raise ValueError(
                f"dimensions must be at most the width of the narrower features, {self.most_dimensions}; got "
                f"{setting.dimensions}"
            )
        return self.projections(setting.image_ridge, setting.text_ridge).of(setting)

    def projections(self, image_ridge: float, text_ridge: float) -> _Projections:
        """All canonical directions of two ridges.

        With C_vv = QΛQᵀ, W_v = Q D Qᵀ is symmetric and D diagonal, so W_v C_vt W_t has the singular values of
        D_v (Q_vᵀ C_vt Q_t) D_t, and the singular vectors Q_v U and Q_t V.

        Raises:
            ValueError: A ridge is 0, and its modality varies in one dimension less than there are pairs; or
                C_vt is 0.
        """
        sums, images, texts = self.sums, self._images, self._texts
        for side, ridge in ((images, image_ridge), (texts, text_ridge)):
            dimensions = side.vectors.shape[1]
            if ridge == 0 and dimensions >= sums.pairs - 1:  # centred rows span no more
                raise ValueError(
                    f"{side.name}_ridge=0 needs at least two pairs more than dimensions in which the "
                    f"features vary, as with fewer any pairs correlate perfectly; got {sums.pairs} pairs and "
                    f"{dimensions} dimensions: give a ridge above 0"
                )
        D_v, D_t = images.weights(image_ridge), texts.weights(text_ridge)  # the diagonals
        U, S, Vh = torch.linalg.svd(D_v[:, None] * self._cross * D_t, full_matrices=False)
        if S[0] == 0:
            raise ValueError("image_features and text_features must correlate; their covariance is 0")
        # The bound below which torch.linalg.matrix_rank takes a singular value for 0.
        rounding = S[0] * max(self._cross.shape) * torch.finfo(S.dtype).eps
        rank = int((rounding < S).sum())
        image_projection = images.vectors @ (D_v[:, None] * U[:, :rank])
        text_projection = texts.vectors @ (D_t[:, None] * Vh[:rank].T)
        # A direction and its opposite are equally good: the largest entry is positive on every machine.
        largest = image_projection.gather(0, image_projection.abs().argmax(0, keepdim=True))
        signs = largest.sign()
        return _Projections(sums, image_projection * signs, text_projection * signs, S[:rank])


def _side(name: str, covariance: Tensor) -> _Side:
    """The eigenvectors of a modality's covariance.

    Raises:
        ValueError: All rows are equal.
    """
    mean_variance = covariance.diagonal().mean().item()
    eps = torch.finfo(covariance.dtype).eps
    if mean_variance <= eps**2:  # unit-norm rows that differ at most by their rounding
        raise ValueError(f"{name}_features must differ; all rows are equal")
    variances, vectors = torch.linalg.eigh(covariance / mean_variance)
    has_variance = variances > variances[-1] * len(variances) * eps  # as the rank of a matrix is counted
    return _Side(name, vectors[:, has_variance], variances[has_variance], mean_variance)


class _Projections(NamedTuple):
    """W_v·U and W_t·V of two ridges, with the canonical correlations S."""

    sums: PairSums
    image_projection: Tensor
    text_projection: Tensor
    correlations: Tensor

    def of(self, setting: Setting) -> CanonicalCorrelation:
        """The projections of a setting with these ridges: its dimensions, with its power of S.

        Where there are fewer directions than it has dimensions, all are taken, and a warning is logged.
        """
        correlations = self.correlations[: setting.dimensions]
        if len(correlations) < setting.dimensions:
            _logger.warning(
                "dimensions=%d: the pairs have %d canonical directions, which are taken",
                setting.dimensions,
                len(correlations),
            )
        scale = correlations**setting.power
        return CanonicalCorrelation(
            setting,
            self.sums.image_mean,
            self.image_projection[:, : len(scale)] * scale,
            self.sums.text_mean,
            self.text_projection[:, : len(scale)] * scale,
            correlations,
        )


@dataclass(frozen=True)
class CanonicalCorrelation:
    """Projections that bring the features of two encoders into one space.

    Attributes:
        setting: The setting of the fit.
        image_mean: μ_v, ``[D]``, float64.
        image_projection: W_v·U·S^power, ``[D, K]``, float64.
        text_mean: μ_t, ``[D']``.
        text_projection: W_t·V·S^power, ``[D', K]``.
        correlations: S, ``[K]``, from the largest; of ridges of 0 the canonical correlations.
    """

    setting: Setting
    image_mean: Tensor
    image_projection: Tensor
    text_mean: Tensor
    text_projection: Tensor
    correlations: Tensor

    @classmethod
    def fit(
        cls,
        image_features: Rows,
        text_features: Rows,
        *,
        dimensions: int = 256,
        image_ridge: float = 1.0,
        text_ridge: float = 1.0,
        power: float = 1.0,
        root: bool = False,
    ) -> CanonicalCorrelation:
        r"""Fit the projections to pairs.

            W_v = (C_vv + r_v·tr(C_vv)/D·I)^−½,   W_t alike,   U S Vᵀ = W_v C_vt W_t
            images(x) = normalise((x/‖x‖ − μ_v)·W_v·U[:, :K]·S[:K]^power),   texts(x) alike with V

        C and μ are those of :class:`PairSums`. Ridges of 0 give canonical correlation analysis (Hotelling
        1936); ridges are of Vinod (1976), here in units of the mean variance; powers of the correlations, for
        pictures and texts, of Gong et al. (IJCV 2014); CSA (ICLR 2025) aligns two frozen encoders so.
        Everything is computed in float64.

        For pairs beyond the memory, give blocks of rows, one after the other, as generators that read them::

            CanonicalCorrelation.fit((load(file) for file in images), (load(file) for file in texts))

        Args:
            image_features: ``[N, D]``, of any norm and floating dtype; or blocks of these rows.
            text_features: ``[N, D']``, or ``[N, S, D']``, S captions of each picture: C_tt is of all
                captions, C_vt of their mean. Or blocks of as many rows as those of the images.
            dimensions: K, at most the narrower width. Where the pairs have fewer canonical directions, as
                fewer pairs than dimensions have, these are taken, and a warning is logged.
            image_ridge: r_v, of the images' mean variance.
            text_ridge: r_t, likewise.
            power: Of the correlations: 0 weighs all dimensions alike.
            root: Take sign(x)·√|x| of all features first.

        Raises:
            TypeError: Features are no tensors.
            ValueError: There are fewer than three pairs, the features differ in length, have NaN or a row of
                zeros, or are equal in all rows; ``dimensions`` are above a width; a ridge or the power is
                negative or not finite; a ridge is 0, and there are not at least two pairs more than
                dimensions in which its features vary; or the covariance C_vt is 0.

        Example:
            >>> shared = torch.randn(200, 2)
            >>> v, t = shared @ torch.randn(2, 8), shared @ torch.randn(2, 5)
            >>> cca = CanonicalCorrelation.fit(v, t, dimensions=2)
            >>> cca.images(v).shape, cca.texts(t[:3]).shape
            (torch.Size([200, 2]), torch.Size([3, 2]))
        """
        setting = Setting(image_ridge, text_ridge, dimensions, power, root)
        bases = Eigenbases(PairSums.of(image_features, text_features, root=root))
        return bases.fit(setting)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the fit by name, to be stored beside its setting."""
        names = ("image_mean", "image_projection", "text_mean", "text_projection", "correlations")
        return {name: getattr(self, name).cpu().contiguous() for name in names}

    @classmethod
    def of_tensors(cls, setting: Setting, tensors: Mapping[str, Tensor]) -> CanonicalCorrelation:
        """The fit of stored tensors, as :meth:`tensors` gives them.

        Raises:
            ValueError: They are others, of another dtype, of shapes that do not fit, or not finite.
        """
        # The three vectors give the sizes; 0, which is refused below, where one is missing.
        missing = torch.empty(0)
        D = tensors.get("image_mean", missing).numel()
        D_text = tensors.get("text_mean", missing).numel()
        K = tensors.get("correlations", missing).numel()
        needed = {
            "image_mean": (D,),
            "image_projection": (D, K),
            "text_mean": (D_text,),
            "text_projection": (D_text, K),
            "correlations": (K,),
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        are_numbers = all(
            tensor.dtype == torch.float64 and bool(tensor.isfinite().all()) for tensor in tensors.values()
        )
        is_empty = 0 in (D, D_text, K)
        if shapes != needed or is_empty or not are_numbers:
            raise ValueError(f"tensors must be {', '.join(needed)}, finite float64; got shapes {shapes}")
        return cls(setting, **tensors)

    def images(self, x: Tensor) -> Tensor:
        """The unit-norm features of pictures in the common space.

        Args:
            x: ``[M, D]``, of any norm and floating dtype.

        Returns:
            ``[M, K]``, float32, or float64 for float64.

        Raises:
            TypeError: No tensor.
            ValueError: Another width, NaN or infinity, or a row of zeros.
        """
        return self._projected("images", x, self.image_mean, self.image_projection)

    def texts(self, x: Tensor) -> Tensor:
        """As :meth:`images`, of texts, ``[M, D']``."""
        return self._projected("texts", x, self.text_mean, self.text_projection)

    @torch.no_grad()
    def _projected(self, name: str, x: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
        """``normalize((x̂ − mean)·projection)``, ``[M, K]``, with x̂ the unit features, in float64.

        On a device without float64 it is computed on the CPU. The result is on x's device, in float64 if x
        is, otherwise in float32.
        """
        check_matrix(name, x)
        if x.shape[1] != len(mean):
            raise ValueError(f"{name} must have {len(mean)} columns; got shape {tuple(x.shape)}")
        check_rows(name, x)
        device = x.device if has_float64(x.device) else torch.device("cpu")
        centred = unit_features(x.to(device), root=self.setting.root) - mean.to(device)
        features = F.normalize(centred @ projection.to(device), dim=-1)
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        return features.to(x.device, dtype)


# --- the choice of a setting ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The settings that :func:`search` tries: all combinations, ``root`` as the sums have it.

    Attributes:
        image_ridges: Ridges of the images.
        text_ridges: Ridges of the texts.
        dimensions: Widths; those above the number of canonical directions are tried as this number.
        powers: Powers of the correlations.
    """

    image_ridges: Sequence[float] = (1.0, 0.1, 0.3, 3.0)
    text_ridges: Sequence[float] = (1.0, 0.03, 0.1, 0.3)
    dimensions: Sequence[int] = (256, 64, 128, 384)
    powers: Sequence[float] = (1.0, 0.5)

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ValueError: One is out of its range.
        """
        # A setting checks its own numbers, and is not kept.
        for ridge in self.image_ridges:
            Setting(image_ridge=ridge)
        for ridge in self.text_ridges:
            Setting(text_ridge=ridge)
        for width in self.dimensions:
            Setting(dimensions=width)
        for power in self.powers:
            Setting(power=power)


class Trial(NamedTuple):
    """A setting and its score on held-out pairs: R@k, in [0, 1], the mean of both directions."""

    setting: Setting
    recall: float


@dataclass(frozen=True)
class _HeldOut:
    """Held-out pairs, to be ranked for one setting after the other.

    Attributes:
        images: ``[N, D]``.
        texts: ``[M, D']``.
        pairs: ``[2, P]``, the image and the text of all partners.
        equal_images: ``[N]``, of each image the first that is equal; None if all differ.
        equal_texts: ``[M]``, likewise.
        k: Of the recall.
    """

    images: Tensor
    texts: Tensor
    pairs: Tensor
    equal_images: Tensor | None
    equal_texts: Tensor | None
    k: int

    @classmethod
    def of(
        cls, images: Tensor, texts: Tensor, image_ids: Ids | None, text_ids: Ids | None, k: int
    ) -> _HeldOut:
        """Check held-out pairs, as :func:`search` takes them, and find the partners.

        Raises:
            ValueError: As :func:`search`.
        """
        if (image_ids is None) != (text_ids is None):
            given = "image_ids" if text_ids is None else "text_ids"
            raise ValueError(f"image_ids and text_ids go together; got {given} alone")
        if image_ids is None or text_ids is None:
            check_pairs(images, texts)
            # Each image has an id of its own; its captions, which stand one after the other, have the same.
            captions = texts.shape[1] if texts.dim() == 3 else 1
            image_ids = torch.arange(len(images))
            text_ids = image_ids.repeat_interleave(captions)
        texts = texts.flatten(0, 1) if texts.dim() == 3 else texts
        for name, x in (("image_features", images), ("text_features", texts)):
            check_matrix(name, x)
            check_rows(name, x)
        if not (len(images) and len(texts)):
            raise ValueError(
                "image_features and text_features must be held-out pairs; got none, of shapes "
                f"{tuple(images.shape)} and {tuple(texts.shape)}"
            )
        check_count("k", k, at_most=min(len(images), len(texts)))
        image_numbers, text_numbers = id_numbers(image_ids, text_ids, images, texts)
        check_partners("image", image_ids, image_numbers, "text", text_numbers)
        check_partners("text", text_ids, text_numbers, "image", image_numbers)
        pairs = (image_numbers[:, None] == text_numbers).nonzero().T
        return cls(images, texts, pairs, _first_equal(images), _first_equal(texts), k)

    def centred(self, sums: PairSums) -> tuple[Tensor, Tensor]:
        """The unit-norm images and texts minus the means of the pairs that are fitted.

        Raises:
            ValueError: As :meth:`PairSums.check_widths`.
        """
        sums.check_widths(self.images, self.texts)
        return (
            unit_features(self.images, root=sums.root) - sums.image_mean,
            unit_features(self.texts, root=sums.root) - sums.text_mean,
        )

    def recall(self, v: Tensor, t: Tensor) -> float:
        """R@k of projected images and texts, in [0, 1], the mean of both directions.

        It counts as :func:`rankloss.metrics.recall`: a query is a hit if fewer than k wrong answers score at
        least as much as the best of its partners.

        Args:
            v: ``[N, K]``.
            t: ``[M, K]``.
        """
        scores = product(F.normalize(v, dim=-1), F.normalize(t, dim=-1).T)
        # A product of equal rows is rounded by their place: all take that of the first, and are tied exactly.
        if self.equal_images is not None:
            scores = scores[self.equal_images]
        if self.equal_texts is not None:
            scores = scores[:, self.equal_texts]
        image, text = self.pairs
        scores_of_partners = scores[image, text]  # [P]
        is_in_front = torch.empty_like(scores)  # of floats, since sums of booleans take six times as long
        recalls = []
        # Rows of the scores are images, columns texts: an image's answers lie along dim 1, a text's along 0.
        for query, answers_dim in ((image, 1), (text, 0)):
            queries = scores.shape[1 - answers_dim]
            best = scores.new_full((queries,), -math.inf)  # of each query, the score of its best partner
            best = best.scatter_reduce(0, query, scores_of_partners, "amax")
            in_front = torch.ge(scores, best.unsqueeze(answers_dim), out=is_in_front).sum(answers_dim)
            # The best partner, and any that is equally good, is itself in front, and no wrong answer.
            is_best_partner = (scores_of_partners >= best[query]).to(in_front)
            best_partners = torch.zeros_like(in_front).scatter_add_(0, query, is_best_partner)
            recalls.append((in_front - best_partners < self.k).double().mean().item())
        return sum(recalls) / 2


def _first_equal(x: Tensor) -> Tensor | None:
    """Of each row the first that is equal to it in the dtype of the scores; None if all differ."""
    return first_equal(x.to(arithmetic_dtype(x)))


@torch.no_grad()
def search(
    sums: Sequence[PairSums],
    image_features: Tensor,
    text_features: Tensor,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    grid: Grid = Grid(),
    k: int = 10,
) -> list[Trial]:
    """Try settings on held-out pairs: all of the grid, of each of the sums.

    Each of the sums is decomposed once, and each pair of ridges once more; dimensions and powers cost the
    similarities of the held-out features, in float32. Memory is N·M beside the features.

    Args:
        sums: The sums of the pairs to fit, one for each value of ``root`` that is tried.
        image_features: Held-out pictures, ``[N, D]``.
        text_features: Held-out texts, ``[N, D']``, or ``[N, S, D']``, S captions of each picture; with ids
            ``[M, D']``.
        image_ids: As in :func:`rankloss.metrics.recall`: an image and a text of one id are partners.
        text_ids: As there.
        grid: The settings.
        k: Of the recall, at most the number of pictures and of texts.

    Returns:
        The trials, the best first; of equally good ones that which the grid has first.

    Raises:
        TypeError: Features are no tensors.
        ValueError: As :meth:`CanonicalCorrelation.fit` and :func:`rankloss.metrics.recall`; the grid is
            empty.

    Example:
        >>> shared = torch.randn(300, 4)
        >>> v, t = shared @ torch.randn(4, 16), shared @ torch.randn(4, 12) + torch.randn(300, 12)
        >>> trials = search([PairSums.of(v[:200], t[:200])], v[200:], t[200:], grid=Grid(dimensions=(2, 4)))
        >>> len(trials), trials[0].recall >= trials[-1].recall
        (64, True)
    """
    held_out = _HeldOut.of(image_features, text_features, image_ids, text_ids, k)
    trials = [trial for of_root in sums for trial in _trials(of_root, held_out, grid)]
    if not trials:
        raise ValueError(f"grid must have at least one setting; got {grid}, for {len(sums)} sums")
    return sorted(trials, key=lambda trial: -trial.recall)


def _trials(sums: PairSums, held_out: _HeldOut, grid: Grid) -> Iterator[Trial]:
    """The trials of one of the sums, in the order of the grid."""
    bases = Eigenbases(sums)
    images, texts = held_out.centred(sums)
    for image_ridge, text_ridge in itertools.product(grid.image_ridges, grid.text_ridges):
        projections = bases.projections(image_ridge, text_ridge)
        v = (images @ projections.image_projection).float()
        t = (texts @ projections.text_projection).float()
        # Each width once, also where several are cut to the number of directions.
        widths = dict.fromkeys(min(width, v.shape[1]) for width in grid.dimensions)
        for power, width in itertools.product(grid.powers, widths):
            setting = Setting(image_ridge, text_ridge, width, power, sums.root)
            scale = projections.correlations[:width].float() ** power
            yield Trial(setting, held_out.recall(v[:, :width] * scale, t[:, :width] * scale))
