"""Methods with the options, weights and temperatures that were published, by the name `paper:<method>:<dataset>[:<pair>]`.

A pair is teacher-student, where a paper or its code sets a value for each pair. Optimiser, schedule and augmentation are
not part of a preset.
"""

from dataclasses import dataclass
from typing import NamedTuple

from kdcache.errors import UsageError, unknown_name
from kdcache.methods import METHODS, Method

__all__ = ["PRESETS", "Preset", "preset"]

PREFIX = "paper:"


@dataclass(frozen=True)
class Preset:
    """`method`, as on the command line, and the temperature `tau`; `source` says where both were published."""

    name: str
    method: str
    tau: float
    source: str

    def build(self) -> Method:
        return METHODS.parse(self.method)


def preset(name: str) -> Preset:
    """The preset `paper:<method>:<dataset>[:<pair>]`. Raises UsageError with those of the same method for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    of_method = ":".join(name.split(":")[:2])
    known = [other for other in PRESETS if other.startswith(f"{of_method}:")]
    pairs = [other for other in known if other.startswith(f"{name}:")]
    if len(name.split(":")) == 3 and pairs:
        raise UsageError(
            f"preset {name!r} is not one",
            why="its values were published for each pair of teacher and student",
            fix=f"name the pair, such as {pairs[0]} (there are {len(pairs)}: kdcache methods --presets)",
        )
    general = ":".join(name.split(":")[:3])
    if general in PRESETS:
        raise UsageError(
            f"unknown preset {name!r}",
            why="no values of its own were published for this pair",
            fix=f"use those of the dataset: {general}",
        )
    raise unknown_name("preset", name, known or PRESETS, fix="list what there is with: kdcache methods --presets")


MDISTILLER = "configurations of mdistiller"
STANDARDIZED = "code of logit standardization (CVPR 2024)"
TTM_PAPER = "TTM (arXiv 2402.11148), appendix A.4"
STAND_IN = "not published for this pair of TTM's Table 13; these are the values of Table 10 for ResNet-18"
RLD_CODE = "configurations of RLD's code (ICLR 2025)"
EA_CODE = "configurations of EA-KD's code"
CLS_KD = "configurations of cls_KD (NKD, ICCV 2023)"
DIST_CODE = "DIST (NeurIPS 2022) and its configurations"
CTKD_CODE = "scripts of CTKD (AAAI 2023)"
MLKD_CODE = "configurations of MLKD's code (CVPR 2023)"
WSLD_CODE = "weighted soft labels (ICLR 2021)"
# EA-KD's code bounds entropies by 100 for CIFAR-100, where log C is meant. A preset has the values that were run.
EA_CIFAR = "entropy_tau=3,entropy_bound=100"

# name, method, tau, source
_FOR_A_DATASET: list[tuple[str, str, float, str]] = [
    ("kd:cifar100", "kd:kd_weight=0.9,ce_weight=0.1", 4, MDISTILLER),
    ("kd:imagenet", "kd:kd_weight=0.5,ce_weight=0.5", 1, MDISTILLER),
    ("zkd:cifar100", "zkd:kd_weight=9,ce_weight=0.1", 2, STANDARDIZED),
    ("zkd:imagenet", "zkd:kd_weight=9,ce_weight=1", 2, STANDARDIZED),
    ("maxlogit:cifar100", "maxlogit:kd_weight=9,ce_weight=0.1", 1, "max-logit temperature, table 3 (zKD+)"),
    ("maxlogit-dkd:cifar100", "maxlogit-dkd:kd_weight=9,ce_weight=1", 1, "max-logit temperature, table 3 (zDKD+)"),
    ("dkd:cifar100", "dkd:beta=8,ce_weight=1", 4, MDISTILLER),
    ("zdkd:cifar100", "zdkd:alpha=9,beta=72,ce_weight=1", 2, STANDARDIZED),
    ("rld:cifar100", "rld:beta=8,ce_weight=1", 4, RLD_CODE),
    ("zrld:cifar100", "zrld:alpha=9,beta=72,ce_weight=1", 2, RLD_CODE),
    ("nkd:cifar100", "nkd:gamma=3.5,ce_weight=1", 3, CLS_KD),
    ("nkd:imagenet", "nkd:gamma=1.5,ce_weight=1", 1, CLS_KD),
    ("wsld:cifar100", "wsld:alpha=2.25,ce_weight=1", 4, WSLD_CODE),
    ("wsld:imagenet", "wsld:alpha=2.5,ce_weight=1", 2, WSLD_CODE),
    ("dist:cifar100", "dist:kd_weight=2,ce_weight=1", 4, DIST_CODE),
    ("dist:imagenet", "dist:kd_weight=2,ce_weight=1", 1, DIST_CODE),
    ("ctkd:cifar100", "ctkd:kd_weight=0.9,ce_weight=0.1,lambda_epochs=10", 1, CTKD_CODE),
    ("ctkd:imagenet", "ctkd:kd_weight=1,ce_weight=1,lambda_epochs=5", 1, CTKD_CODE),
    ("zctkd:cifar100", "zctkd:kd_weight=9,ce_weight=0.1,lambda_epochs=10", 1, STANDARDIZED),
    ("mlkd:cifar100", "mlkd:kd_weight=0.9,ce_weight=0.1", 4, MLKD_CODE),
    ("mlkd:imagenet", "mlkd:kd_weight=0.5,ce_weight=0.5", 1, MLKD_CODE),
    ("zmlkd:cifar100", "zmlkd:kd_weight=9,ce_weight=0.1", 2, STANDARDIZED),
    ("eakd:cifar100", f"eakd:kd_weight=0.9,ce_weight=0.1,{EA_CIFAR}", 4, EA_CODE),
    ("eakd:imagenet", "eakd:kd_weight=0.5,ce_weight=1,entropy_tau=2", 1, EA_CODE),
    ("eadkd:cifar100", f"eadkd:beta=8,ce_weight=1,{EA_CIFAR}", 4, EA_CODE),
    ("eadkd:imagenet:resnet34-resnet18", "eadkd:beta=0.5,warmup_epochs=1,ce_weight=1,entropy_tau=3", 1, EA_CODE),
    ("wttm:imagenet:resnet34-resnet18", "wttm:kd_weight=1.6,ce_weight=1", 1 / 0.8, TTM_PAPER),
    # Table 10 has one line of values for all four teachers of ResNet-18.
    ("wttm:imagenet:resnet50-resnet18", "wttm:kd_weight=1.6,ce_weight=1", 1 / 0.8, TTM_PAPER),
    ("wttm:imagenet:resnet101-resnet18", "wttm:kd_weight=1.6,ce_weight=1", 1 / 0.8, TTM_PAPER),
    ("wttm:imagenet:resnet152-resnet18", "wttm:kd_weight=1.6,ce_weight=1", 1 / 0.8, TTM_PAPER),
    ("wttm:imagenet:deit3_s-deit_t", "wttm:kd_weight=1.6,ce_weight=1", 1 / 0.8, STAND_IN),
    ("nkd:imagenet:deit3_s-deit_t", "nkd:gamma=1,ce_weight=1", 1, CLS_KD),
    ("wttm:imagenet:resnet50-mobilenetv1", "wttm:kd_weight=3.5,ce_weight=1", 1 / 0.7, TTM_PAPER),
]


class _Ttm(NamedTuple):
    """A pair in the TTM paper's tables 8 and 9: gamma = 1 / tau, and the weight beta of the loss."""

    ttm_gamma: float
    ttm_beta: float
    wttm_gamma: float
    wttm_beta: float
    no_ce_gamma: float | None = None  # of wttm without cross entropy


_TTM = {
    "wrn40_2-wrn16_2": _Ttm(0.1, 101, 0.1, 4, 0.2),
    "wrn40_2-wrn40_1": _Ttm(0.1, 76, 0.1, 3, 0.5),
    "resnet56-resnet20": _Ttm(0.3, 7, 0.3, 1.5, 0.6),
    "resnet110-resnet20": _Ttm(0.2, 8, 0.2, 2, 0.4),
    "resnet110-resnet32": _Ttm(0.1, 33, 0.1, 1.5, 0.4),
    "resnet32x4-resnet8x4": _Ttm(0.1, 100, 0.1, 3, 0.5),
    "vgg13-vgg8": _Ttm(0.1, 45, 0.1, 2.25, 0.2),
    "vgg13-mobilenetv2": _Ttm(0.2, 16, 0.2, 3),
    "resnet50-mobilenetv2": _Ttm(0.2, 20, 0.2, 5),
    "resnet50-vgg8": _Ttm(0.1, 70, 0.1, 2),
    "resnet32x4-shufflenetv1": _Ttm(0.2, 12, 0.2, 1.4),
    "resnet32x4-shufflenetv2": _Ttm(0.4, 40, 0.4, 16),
    "wrn40_2-shufflenetv1": _Ttm(0.3, 8, 0.3, 3),
}
# DKD's beta where it is not 8, and the temperature and weight of zkd where they are not 2 and 9.
_DKD = {
    "vgg13-vgg8": 6,
    "vgg13-mobilenetv2": 6,
    "wrn40_2-mobilenetv2": 6,
    "wrn40_2-resnet8x4": 6,
    "wrn40_2-wrn16_2": 6,
    "wrn40_2-wrn40_1": 6,
    "resnet56-resnet20": 2,
    "resnet110-resnet20": 2,
    "resnet110-resnet32": 2,
}
_DKD_BY_RLD = {"wrn40_2-mobilenetv2", "wrn40_2-resnet8x4", "resnet110-resnet20"}  # pairs that mdistiller has no file of
_ZKD = {
    "vgg13-vgg8": (3, 9),
    "resnet32x4-wrn16_2": (3, 9),
    "resnet32x4-wrn40_2": (3, 9),
    "wrn40_2-mobilenetv2": (3, 9),
    "vgg13-mobilenetv2": (3, 9),
    "resnet50-mobilenetv2": (3, 1),
}
_IMAGENET_BETA = {"resnet34-resnet18": 0.5, "resnet50-mobilenetv1": 2}


def _all() -> dict[str, Preset]:
    rows = list(_FOR_A_DATASET)
    for pair, found in _TTM.items():
        options = f"kd_weight={found.ttm_beta:g},ce_weight=1"
        rows.append((f"ttm:cifar100:{pair}", f"ttm:{options}", 1 / found.ttm_gamma, TTM_PAPER))
        options = f"kd_weight={found.wttm_beta:g},ce_weight=1"
        rows.append((f"wttm:cifar100:{pair}", f"wttm:{options}", 1 / found.wttm_gamma, TTM_PAPER))
        if found.no_ce_gamma is not None:
            rows.append((f"wttm:cifar100:{pair}:no-ce", "wttm", 1 / found.no_ce_gamma, TTM_PAPER))
    for pair, beta in _DKD.items():
        where = RLD_CODE if pair in _DKD_BY_RLD else MDISTILLER
        rows.append((f"dkd:cifar100:{pair}", f"dkd:beta={beta},ce_weight=1", 4, where))
        # The code of logit standardization multiplies both of a configuration's weights by 9.
        rows.append((f"zdkd:cifar100:{pair}", f"zdkd:alpha=9,beta={9 * beta},ce_weight=1", 2, STANDARDIZED))
    for pair, (tau, weight) in _ZKD.items():
        rows.append((f"zkd:cifar100:{pair}", f"zkd:kd_weight={weight},ce_weight=0.1", tau, f"{STANDARDIZED}, logs"))
    for pair, beta_in in _IMAGENET_BETA.items():
        options = f"beta={beta_in:g},warmup_epochs=1,ce_weight=1"
        rows.append((f"dkd:imagenet:{pair}", f"dkd:{options}", 1, MDISTILLER))
        rows.append((f"rld:imagenet:{pair}", f"rld:{options}", 1, RLD_CODE))
    return {PREFIX + name: Preset(PREFIX + name, spec, float(tau), source) for name, spec, tau, source in sorted(rows)}


PRESETS = _all()
