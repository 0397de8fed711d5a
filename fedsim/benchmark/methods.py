"""The methods of the benchmark: points in the grid (imputer, fusion, scorer, loss) x strategy.

Three groups vary one thing each and hold the rest: (a) the fusion, (b) the imputer, (c) the federated optimisation.
They meet in `mmfede-zero` (FedE, gate, zeros), which is a member of all three. Two more take MMFeD3-HidE apart, see
`fedsim.benchmark.ablations`, and run only when they are asked for. Groups (a) and (c) impute with zeros: a
standardised token has mean zero, so a zero is the same neutral stand-in for every fusion and strategy, and no imputer's
own quality, training or noise enters what is compared; what an imputer adds is group (b)'s question. Scorer (ComplEx)
and loss (one-vs-all) are the config's defaults for every method.

To add one: add it to the list `_ALL` below.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.benchmark.ablations import IMPUTERS, Variant, distillation_variants, step_variants
from fedsim.errors import ConfigError

GROUPS = {
    "a": "multimodal models inside MMFedE",
    "b": "imputers inside MMFedE",
    "c": "federated optimisation on MMFedE",
    "references": "without federation, without modalities, without anything hidden",
    "ablation": "MMFeD3 without parts: imputer x level x direction of distillation",
    "steps": "MMFeD3-HidE with other numbers of diffusion and sampling steps",
}

# What tuning tries of a method with the best of the recipe's trials: two values of what is its own, or these.
OTHERS = ({"model.dropout": 0.8}, {"training.learning_rate": 0.08})


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: of folders, files and the command line.
        groups: the groups it is a member of.
        settings: dotted config path -> value, what makes the method.
        title: what it is, in a few words.
        source: where it comes from.
        sampled: settings that only a loss with sampled negatives reads.
        fixed_rate: the settings say what is hidden, so one run serves all missing rates.
        ranked: whether it may be the best; a reference that sees what others do not may not.
        variant_of: the method whose tuned values it runs with; empty if it has its own.
        trials: what tuning tries of this method with the best of the recipe's trials; as many for every method.
    """

    name: str
    groups: tuple[str, ...]
    settings: Mapping[str, Any]
    title: str
    source: str
    sampled: Mapping[str, Any] = field(default_factory=dict)
    fixed_rate: bool = False
    ranked: bool = True
    variant_of: str = ""
    trials: tuple[Mapping[str, Any], ...] = OTHERS


def _settings(strategy: str, imputer: str, fusion: str) -> dict[str, Any]:
    return {"federation.strategy": strategy, "model.imputer": imputer, "model.fusion": fusion}


def _two(values: Sequence[float], *fields: str) -> tuple[Mapping[str, Any], ...]:
    """Give all fields the one value, or the other."""
    return tuple(dict.fromkeys(fields, value) for value in values)


def _fusion(name: str, fusion: str, title: str, source: str, **others: Any) -> Method:
    return Method(f"mmfede-{name}", ("a",), _settings("fede", "zero", fusion), title, source, **others)


def _imputer(name: str, imputer: str, title: str, source: str, **others: Any) -> Method:
    return Method(f"mmfede-{name}", ("b",), _settings("fede", imputer, "gate"), title, source, **others)


def _strategy(name: str, title: str, source: str, **others: Any) -> Method:
    return Method(f"{name}-zero", ("c",), _settings(name, "zero", "gate"), title, source, **others)


def _reference(name: str, strategy: str, fusion: str, title: str, source: str, *, ranked: bool = True) -> Method:
    settings = _settings(strategy, "zero", fusion) | {"data.missing_rate": 0.0, "data.missing_pattern": "random"}
    return Method(name, ("references",), settings, title, source, fixed_rate=True, ranked=ranked)


def _variant(group: str, variant: Variant) -> Method:
    base = _settings("mmfed3", IMPUTERS[variant.base.removeprefix("mmfed3-")], "gate")
    return Method(variant.name, (group,), {**base, **variant.settings}, variant.title, "-", variant_of=variant.base)


LOGITS = _two((1.0, 4.0), "distillation.logit_to_client", "distillation.logit_to_global")

_ALL = (
    _reference("local", "local", "none", "structure alone, every client alone", "-"),
    _reference("fede", "fede", "none", "structure alone, FedE", "Chen et al., IJCKG 2021"),
    _reference("central", "central", "gate", "all data in one place, nothing hidden", "-", ranked=False),
    Method("local-zero", ("references",), _settings("local", "zero", "gate"), "every client alone, gate, zeros", "-"),
    _fusion("ikrl", "ikrl", "energies of structure and each modality", "Xie et al., IJCAI 2017"),
    _fusion("tbkgc", "tbkgc", "energies of structure and one multimodal vector", "Mousselly-Sergieh et al., *SEM 2018"),
    _fusion("mose", "split", "a scorer per modality", "Zhao et al., EMNLP 2022"),
    _fusion("adamf", "adamf", "adaptive weights of modalities", "Zhang et al., LREC-COLING 2024"),
    _fusion(
        "imf",
        "imf",
        "low-rank interactions and decision fusion",
        "Li et al., WWW 2023",
        trials=_two((32, 128), "model.fusion_rank"),
    ),
    _fusion(
        "mocme",
        "mocme",
        "complementarity-guided experts",
        "MoCME, as far as its abstract tells",
        sampled={"training.negative_weighting": "entropy"},
        trials=_two((2, 5), "model.num_experts"),
    ),
    Method(
        "mmfede-zero",
        ("a", "b", "c"),
        _settings("fede", "zero", "gate"),
        "MMFedE: FedE, gate, zeros",
        "arXiv:2506.22036; FedE: Chen et al., IJCKG 2021",
    ),
    _imputer("mean", "mean", "mean of the client's available tokens", "-"),
    _imputer("random", "random", "noise", "MoSE: Zhao et al., EMNLP 2022"),
    _imputer(
        "nearest",
        "nearest",
        "mean of the nearest entities in structure",
        "-",
        trials=_two((5, 20), "imputer.num_neighbours"),
    ),
    _imputer(
        "ridge",
        "ridge",
        "ridge regression from the other tokens",
        "-",
        trials=_two((100.0, 10000.0), "imputer.ridge_strength"),
    ),
    _imputer("mlp", "mlp", "MLP regression from the other tokens", "-", trials=_two((0.1, 10.0), "imputer.weight")),
    _imputer("vae", "vae", "conditional multimodal VAE", "-", trials=_two((0.01, 1.0), "imputer.kl_weight")),
    _imputer(
        "gan",
        "gan",
        "generator and discriminator",
        "MACO: Zhang et al., 2023",
        trials=_two((0.01, 1.0), "imputer.adversarial_weight"),
    ),
    _imputer(
        "hide", "diffusion", "HidE inside MMFedE", "arXiv:2506.22036", trials=_two((0.1, 10.0), "diffusion.weight")
    ),
    _strategy(
        "fedprox", "proximal term", "Li et al., MLSys 2020", trials=_two((0.001, 0.0001), "federation.proximal_mu")
    ),
    _strategy(
        "fedec",
        "embedding contrast",
        "Chen et al., KBS 2022",
        trials=_two((1.0, 10.0), "federation.contrastive_weight"),
    ),
    _strategy("fedlu", "mutual logit distillation", "Zhu et al., WWW 2023", trials=LOGITS),
    _strategy("fedr", "relation embeddings are shared, entities stay", "Zhang et al., Findings of EMNLP 2022"),
    _strategy(
        "pfedeg",
        "a mixture of clients for each client",
        "in the style of PFedEG",
        trials=_two((1.0, 5.0), "federation.affinity_temperature"),
    ),
    Method(
        "mmfed3-zero",
        ("c", "ablation"),
        _settings("mmfed3", "zero", "gate"),
        "dual distillation, zeros",
        "arXiv:2506.22036",
        trials=LOGITS,
    ),
    Method(
        "mmfed3-mean",
        ("ablation",),
        _settings("mmfed3", "mean", "gate"),
        "dual distillation, mean of the client's available tokens",
        "arXiv:2506.22036",
        trials=LOGITS,
    ),
    Method(
        "mmfed3-hide",
        tuple(GROUPS),
        _settings("mmfed3", "diffusion", "gate"),
        "MMFeD3-HidE, the default config",
        "arXiv:2506.22036",
        trials=LOGITS,
    ),
    *(_variant("ablation", variant) for variant in distillation_variants()),
    *(_variant("steps", variant) for variant in step_variants()),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def select_methods(groups: Sequence[str], names: Sequence[str]) -> list[Method]:
    """Return the members of groups and the methods named, in the order of the table; all but variants if none is.

    Raises:
        ConfigError: if a group or a method is unknown.
    """
    if not groups and not names:
        return [method for method in _ALL if not method.variant_of]
    for group in groups:
        check_name("group", group, GROUPS)
    for name in names:
        check_name("method", name, METHODS)
    return [method for method in _ALL if method.name in names or set(groups) & set(method.groups)]


def without_variants(methods: Sequence[Method]) -> list[Method]:
    """Leave out variants, which run with what is tuned for another; ConfigError if nothing is left to tune."""
    found = [method for method in methods if not method.variant_of]
    if not found:
        asked = methods[0]
        raise ConfigError(f"{asked.name} runs with what is tuned for {asked.variant_of}; tune that one")
    return found


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Refuse an unknown name; ConfigError names one that is like it, if there is one."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    advice = f"the nearest is '{near[0]}', and " if near else ""
    raise ConfigError(f"unknown {what} '{name}'; {advice}fedsim benchmark --list shows all")
