"""The experiment config: one frozen, validated tree that serves YAML files, the command line, sweeps and the docs.

Every field has a default; together the defaults are the main job (MMFeD3-HidE on `wn_noto`, three clients, half of
the texts and pictures hidden, on Ray). Unknown keys are errors that name the nearest valid key.
"""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from fedsim.config_types import Count, Positive, Rate, Section, StorageURI, Weight
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.errors import ConfigError
from fedsim.faults_config import FaultsConfig
from fedsim.federation_config import CommunicationConfig, DistillationConfig, FederationConfig, ParticipationConfig
from fedsim.imputer_config import ImputerConfig
from fedsim.parsing import parse_yaml
from fedsim.privacy_config import SecureAggregationConfig
from fedsim.report_config import ReportConfig
from fedsim.robustness_config import AdversaryConfig, RobustnessConfig
from fedsim.watching_config import WatchingConfig


class DataConfig(Section):
    """Which graph, how it is divided among clients, and which modalities each client lacks (method.md section 2)."""

    path: str = Field("wn_noto", description="bundled data set, a data set folder, or a folder name under FEDSIM_DATA")
    split: Literal["relation", "cluster", "dirichlet", "given"] = Field(
        "relation", description="how triples are divided among clients; 'given' reads split_file"
    )
    split_file: str | None = Field(None, description="saved split: a name in the data set's splits/ or a file")
    num_clients: Count = Field(3, description="number of clients; a given split brings its own")
    dirichlet_alpha: Positive = Field(0.5, description="concentration of the dirichlet split; small is uneven")
    modalities: tuple[str, ...] | None = Field(None, description="modalities used; null takes all, [] structure alone")
    missing_rate: Rate | dict[str, Rate] = Field(
        0.5,
        description="share of the available features hidden at each client, one number or one per modality (else 0)",
    )
    missing_pattern: Literal["random", "client", "natural"] = Field(
        "random", description="hide per entity, a whole modality at some clients, or nothing"
    )
    feature_noise: Weight = Field(0.0, description="per-client noise on features, relative to their RMS")
    alignment: Literal["given", "psu"] = Field(
        "given",
        description="where common ids come from: the data set, or private set union of names (docs/security.md)",
    )
    seed: int | None = Field(None, description="seed of the split and of what is hidden; null takes the run's seed")

    @model_validator(mode="after")
    def _given_needs_file(self) -> "DataConfig":
        if (self.split == "given") != (self.split_file is not None):
            raise ValueError("data.split 'given' and data.split_file go together: set both or neither")
        return self


class ModelConfig(Section):
    """The client model: imputer -> fusion -> scorer (method.md section 3)."""

    dim: Annotated[int, Field(ge=2, multiple_of=2)] = Field(128, description="width of tokens and entity embeddings")
    scorer: str = Field("complex", description="transe (L1), transe_l2, distmult, complex or rotate")
    fusion: str = Field(
        "gate", description="gate (eq. 2), split (MoSE), ikrl, tbkgc, adamf, imf, mocme, or none (structure alone)"
    )
    imputer: str = Field(
        "diffusion", description="zero, mean, random, nearest, ridge, mlp, vae, gan or diffusion (HidE)"
    )
    gate_hidden: Count = Field(32, description="hidden width of the fusion gate")
    fusion_rank: Count = Field(64, description="rank of the imf fusion: products of projected tokens")
    num_experts: Count = Field(3, description="views that the mocme fusion makes of each token")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.6, description="dropout on the query vector")
    init_scale: Positive = Field(0.1, description="standard deviation of the initial entity and relation embeddings")
    phase_scale: Positive = Field(
        1.0, description="rotate: radians per unit of a relation's numbers, so that its phases learn so much faster"
    )


class DiffusionConfig(Section):
    """HidE: the imputation diffusion over hyper-modal embeddings (method.md section 4)."""

    steps: Count = Field(50, description="K, steps of the forward process")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="noise schedule; linear ends near zero signal")
    prediction: Literal["x0", "epsilon"] = Field("x0", description="what the denoiser predicts")
    sampling_steps: Count = Field(4, description="S <= K, DDIM steps of an imputation")
    num_draws: Count = Field(2, description="imputations averaged; their variance goes to the gate")
    impute_each: Literal["epoch", "round"] = Field("round", description="sample anew each local epoch, or once a round")
    unseen: Literal["draw", "mean"] = Field(
        "draw",
        description="tokens of an entity of which neither the client nor a prototype tells a modality: drawn from "
        "structure, or the mean of the client's tokens",
    )
    hidden: Count = Field(128, description="width of the denoiser")
    num_blocks: Count = Field(2, description="residual blocks of the denoiser")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.995, description="EMA of the denoiser, warmed up")
    weight: Weight = Field(1.0, description="w_diff, weight of L_diff in eq. 8")
    batch_size: Count = Field(128, description="entities per step that train the denoiser")
    link_rows: Annotated[int, Field(ge=0)] = Field(
        32, description="missing entities per step whose one-step estimate carries the link-prediction gradient"
    )
    hide_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the available image and text tokens that training hides, anew each epoch"
    )
    min_snr: Positive | None = Field(None, description="weigh L_diff by min(SNR, this); null weighs steps alike")
    use_prototypes: bool = Field(True, description="condition on the server's prototypes where it sent them")

    @model_validator(mode="after")
    def _fewer_sampling_steps(self) -> "DiffusionConfig":
        if self.sampling_steps > self.steps:
            raise ValueError(f"diffusion.sampling_steps {self.sampling_steps} must not exceed steps {self.steps}")
        return self


class TrainingConfig(Section):
    """Local training at a client (method.md eq. 8)."""

    loss: str = Field(
        "one_vs_all",
        description="one_vs_all (cross-entropy over all entities), sampled_softmax (over the answer and negatives) or "
        "self_adversarial",
    )
    batch_size: Count = Field(256, description="triples per step")
    local_epochs: Annotated[int, Field(ge=0)] = Field(3, description="epochs per round; 0 trains nothing (benchmarks)")
    optimizer: Literal["adam", "adagrad"] = Field("adam", description="optimiser of all parameters")
    learning_rate: Positive = Field(0.01, description="learning rate of the embedding tables")
    module_learning_rate: Positive | None = Field(
        0.002, description="learning rate of projections, fusion and imputer; null takes learning_rate"
    )
    reset_optimizer: Literal["never", "global", "always"] = Field(
        "never", description="whose optimiser state starts anew each round: nobody's, the global copy's, everybody's"
    )
    reciprocal: bool = Field(True, description="a second embedding per relation for (?, relation, tail) queries")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="label smoothing of the cross-entropies"
    )
    n3_weight: Weight = Field(0.0, description="weight of the N3 regulariser")
    num_negatives: Count = Field(256, description="negatives per query of the losses that sample them")
    negatives: Literal["per_triple", "filtered", "shared"] = Field(
        "per_triple",
        description="which negatives: of each query, of each query without known answers (FedE), or one set for a "
        "client's whole batch",
    )
    negative_weighting: Literal["belief", "entropy"] = Field(
        "belief", description="what weighs a negative of self_adversarial: its score, or how unsure the model is of it"
    )
    margin: Weight = Field(10.0, description="gamma of self_adversarial; 0 with scorers that are no distances, as FedE")
    adversarial_temperature: Weight = Field(1.0, description="temperature of self_adversarial; 0 weighs all alike")
    corruption: Literal["tail", "both"] = Field("both", description="sides asked for in training")
    compile: bool = Field(
        False,
        description="distances of transe and rotate by C code on one thread, which each process compiles at its start "
        "(needs a C compiler); pays after about 50 steps of 512 triples",
    )


class EvaluationConfig(Section):
    """Filtered ranking (method.md section 7)."""

    every: Count = Field(1, description="validate every so many rounds")
    protocol: Literal["both", "fede"] = Field("both", description="both sides, or FedE's tail only with Hits@1/5/10")
    evaluate_on: Literal["trained", "aggregated"] | None = Field(
        None, description="rank clients' models as trained or as aggregated; null: aggregated with protocol fede only"
    )
    patience: Count | None = Field(None, description="stop after so many validations without a better MRR")
    batch_size: Count = Field(512, description="queries ranked at once")
    measure_every: Count | None = Field(
        None, description="rounds between measurements of imputation and consistency; null: at the end alone"
    )

    @property
    def on_aggregated(self) -> bool:
        """Whether clients are ranked with what the server aggregated."""
        return self.evaluate_on == "aggregated" or (self.evaluate_on is None and self.protocol == "fede")


class RuntimeConfig(Section):
    """Where clients run (method.md section 8)."""

    kind: Literal["ray", "in_process"] = Field("ray", description="Ray actors, or all in this process")
    placement: Literal["auto", "dedicated", "pooled"] = Field("auto", description="one actor per client, or a pool")
    num_actors: Count | None = Field(
        None, description="client actors of a pool; null takes what the cluster has room for"
    )
    clients_per_batch: Count | None = Field(
        None, description="most clients that train as one stacked computation; 1 trains one by one, null chooses"
    )
    cpus_per_actor: Positive = Field(0.5, description="CPUs reserved per client actor")
    gpus_per_client: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="fraction of a GPU per client actor")
    torch_threads: Count = Field(1, description="torch threads per process; the last digits depend on it")
    address: str | None = Field(None, description="Ray cluster to join; null starts one on this machine")
    nodes_wait_seconds: Weight = Field(
        0.0, description="longest wait for a cluster that scales to have room for num_actors; 0 takes what is there"
    )
    timeout_seconds: Positive = Field(1800.0, description="longest wait for one client's work")
    dashboard: bool = Field(True, description="start Ray's dashboard too, about 200 MB; a cluster joined has its own")
    scratch: str | None = Field(None, min_length=1, description="folder for idle clients' state; null: in memory")

    @model_validator(mode="after")
    def _waits_for_something(self) -> "RuntimeConfig":
        if self.nodes_wait_seconds > 0 and (self.num_actors is None or self.address is None):
            raise ValueError(
                "runtime.nodes_wait_seconds waits for the nodes of a cluster (runtime.address) to have room for "
                "runtime.num_actors: set both"
            )
        return self


class CheckpointConfig(Section):
    """What a run keeps."""

    every: Count = Field(1, description="checkpoint every so many rounds, and whenever validation improves")
    keep: Annotated[int, Field(ge=1)] = Field(2, description="checkpoints kept, beside the best one")


class Config(Section):
    """The whole experiment."""

    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of every random draw")
    output: str | None = Field(
        None, description="run folder; null takes runs/<data>-<strategy>-<time>, or the name of storage"
    )
    storage: StorageURI | None = Field(
        None, description="URI such as s3://bucket/runs/trial where the run is kept as well, to resume it anywhere"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    imputer: ImputerConfig = ImputerConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    participation: ParticipationConfig = ParticipationConfig()
    distillation: DistillationConfig = DistillationConfig()
    communication: CommunicationConfig = CommunicationConfig()
    privacy: DifferentialPrivacyConfig = DifferentialPrivacyConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    faults: FaultsConfig = FaultsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()
    watching: WatchingConfig = WatchingConfig()

    @model_validator(mode="after")
    def _asked_sides_are_trained(self) -> "Config":
        tails_alone = self.training.corruption == "tail" and self.training.reciprocal
        if tails_alone and self.evaluation.protocol == "both":
            raise ValueError(
                "training.corruption 'tail' with training.reciprocal leaves the relations of head queries untrained, "
                "but evaluation.protocol 'both' asks for heads: set the protocol to fede, or reciprocal to false"
            )
        return self

    @model_validator(mode="after")
    def _compiles_for_cpus(self) -> "Config":
        if self.training.compile and self.runtime.gpus_per_client > 0:
            raise ValueError(
                "training.compile is for clients on CPUs: set it to false, or runtime.gpus_per_client to 0"
            )
        return self

    @model_validator(mode="after")
    def _more_clients_can_be_selected(self) -> "Config":
        federation = self.federation
        if self.participation.over_selection > 1 and federation.cohort_size is None and federation.cohort_fraction == 1:
            raise ValueError(
                f"participation.over_selection {self.participation.over_selection:g} asks more clients than a cohort "
                f"has, but the cohort is everybody: set federation.cohort_size or federation.cohort_fraction"
            )
        return self

    @model_validator(mode="after")
    def _late_clients_can_be_left_out(self) -> "Config":
        if self.faults.round_deadline_seconds is not None and self.checkpoint.every > 1:
            raise ValueError(
                f"faults.round_deadline_seconds brings late clients back to the round before, and needs its "
                f"checkpoint: set checkpoint.every to 1, not {self.checkpoint.every}"
            )
        return self

    @property
    def data_seed(self) -> int:
        """Seed of the split and of what is hidden."""
        return self.seed if self.data.seed is None else self.data.seed


def config_fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, pydantic field) for every leaf of the tree, in order of declaration."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from config_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def make_config(tree: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Validate a nested mapping, after setting dotted paths in it.

    Args:
        tree: nested sections, as read from YAML.
        overrides: dotted path -> value, for example ``{"federation.num_rounds": 20}``.

    Raises:
        ConfigError: naming the field, the value and the rule, for each thing that is wrong.
    """
    nested: dict[str, Any] = _copy_tree(tree or {})
    for path, value in (overrides or {}).items():
        *sections, name = path.split(".")
        node = nested
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"config key '{path}': '{section}' is a value, not a section")
            node = child
        node[name] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as err:
        raise ConfigError("\n".join(_explain(e) for e in err.errors())) from err


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML config (the defaults if no path is given) and apply dotted overrides.

    Raises:
        ConfigError: if the file cannot be read, is not a mapping, or holds a key or value that is not accepted.
    """
    if path is None:
        return make_config({}, overrides)
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"config file {path} cannot be read: {err}; give the path of a YAML file") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold sections (key: value), not a {type(tree).__name__}")
    try:
        return make_config(tree, overrides)
    except ConfigError as err:
        raise ConfigError(f"config file {path}: {err}") from err


def dump_config(config: Config, *, comments: bool = False) -> str:
    """Write a config as YAML that `load_config` reads back; with `comments`, each field's meaning behind it."""
    if not comments:
        return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    lines: list[str] = []
    section = ""
    for path, field in config_fields():
        *parents, name = path.split(".")
        if parents and parents[0] != section:
            section = parents[0]
            lines.append(f"{section}:")
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        text = yaml.safe_dump(_plain(value), default_flow_style=True).strip().removesuffix("...").strip()
        lines.append(f"{'  ' if parents else ''}{name}: {text}  # {field.description}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_none=True)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _copy_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy_tree(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [p for p, _ in config_fields()] + list(Config.model_fields)
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        return f"unknown config key '{path}'; the nearest valid key is '{near[0]}'"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"config field '{path}' = {error['input']!r}: {message}" if path else message
