"""Clipping and Gaussian noise on what clients send (docs/privacy.md).

Sources: the Gaussian mechanism (Dwork and Roth, 2014) on clients' updates as in McMahan et al., "Learning
Differentially Private Recurrent Language Models", ICLR 2018: each client clips what it sends, by parts of bounds of
their own, and a server that knows how many clients to expect divides the noised sum by that number. That rows have
different owners, and what becomes of tokens and soft queries, is ours.

A *unit* (`privacy.unit`) is what one epsilon is about: all that a client sends in a round, or one item of it, which is
an entity's row with its tokens, the shared modules, or a soft query. A unit has parts i of L2 bounds C_i; scaled by
1 / C_i they make one vector of a norm up to sqrt(P), with P parts. So the noise of part i has the standard deviation

    sigma_i = z sqrt(P) C_i,

and the unit goes through one Gaussian mechanism with noise multiplier z. The parts are

- rows and modules, as their change against what the server sent: C is `clip_norm` and `module_clip_norm`;
- tokens, standardised and so of norm sqrt(dim): C follows from their number. They are standardised again after the
  noise;
- soft queries: C of a vector is `query_clip_norm`, that of its labels as probabilities is 1. Labels are made
  probabilities again after the noise. Candidates are drawn at random: the best ones would tell of the private model.

Which rows and tokens a client has is public, and so is nothing else: with differential privacy a client does not say
how many triples it has, and all weigh alike in the mean of the modules.

The noise comes from a generator that is seeded like all others: whoever knows the seed can take it off. That is for
simulations. It is drawn as single-precision floats, whose gaps could tell values apart (Mironov, CCS 2012); a
deployment needs a discrete Gaussian or a secure generator, and the fixed point encoding of the sums comes after the
noise.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.config import Config
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.errors import ConfigError
from fedsim.federated.aggregation import SCALE, ModuleMean, RowMean, encode
from fedsim.federated.messages import Broadcast, ClientUpdate, SoftQueries
from fedsim.federated.strategy import GlobalModel, Strategy
from fedsim.federation_config import ParticipationConfig
from fedsim.models.parameters import Params

_WITHIN = 1 - 1e-6  # of a bound: what is clipped stays below it after rounding
_LEAST_LABEL = 1e-6  # probability of a candidate after the noise


def check_privacy(config: Config, strategy: Strategy) -> None:
    """Refuse a config whose messages the mechanism does not cover, or that breaks what the accountant assumes.

    Raises:
        ConfigError: naming the field and what to set instead.
    """
    settings = config.privacy
    if not settings.enabled:
        return
    what = f"config field 'privacy.noise' = '{settings.noise}'"
    if not strategy.federated:
        raise ConfigError(
            f"{what} protects what clients send, and with federation.strategy '{config.federation.strategy}' they send "
            f"nothing: set it to none"
        )
    if config.communication.top_k is not None:
        raise ConfigError(
            f"{what} does not go with communication.top_k: which rows changed most tells of the data; set top_k to null"
        )
    if settings.noise == "client":
        return
    if config.federation.cohort_size is not None:
        raise ConfigError(
            f"{what} is accounted for cohorts that each client joins on its own (Poisson sampling), but "
            f"federation.cohort_size draws a fixed number: set federation.cohort_fraction instead"
        )
    if config.participation != ParticipationConfig():
        raise ConfigError(
            f"{what} is accounted for cohorts that each client joins on its own, which the section 'participation' "
            f"changes: leave it at its defaults, or let the clients add the noise (privacy.noise client)"
        )
    if config.secure_aggregation.enabled and config.federation.cohort_fraction < 1:
        raise ConfigError(
            f"{what} with federation.cohort_fraction below 1 has cohorts of any size, and secure aggregation needs two "
            f"clients at least: set the fraction to 1, or let the clients add the noise (privacy.noise client)"
        )
    robust = {
        "federation.aggregator": (config.federation.aggregator, "mean"),
        "robustness.max_norm_ratio": (config.robustness.max_norm_ratio, None),
    }
    for field, (value, plain) in robust.items():
        if value != plain:
            raise ConfigError(
                f"{what} noises plain sums, and {field} {value} compares updates: set it to {plain or 'null'}, or let "
                f"the clients add the noise (privacy.noise client)"
            )
    if strategy.keeps_rows:
        raise ConfigError(
            f"{what} noises sums, but federation.strategy '{config.federation.strategy}' sends each client a table of "
            f"its own: let the clients add the noise (privacy.noise client)"
        )
    if strategy.sends_prototypes or strategy.sends_soft_queries:
        raise ConfigError(
            f"{what} noises the sums of rows and modules alone: set distillation.send_prototypes to false and "
            f"distillation.num_soft_queries to 0, or let the clients add the noise (privacy.noise client)"
        )


def privatise(
    update: ClientUpdate, received: Broadcast, settings: DifferentialPrivacyConfig, generator: torch.Generator
) -> ClientUpdate:
    """Clip what a client is about to send, and add its noise unless the server does.

    Args:
        update: all of the client's rows, in float32.
        received: what the server sent it for the round, in float32.
        settings: bounds and noise.
        generator: of the noise.
    """
    multiplier = settings.noise_multiplier if settings.noise == "client" else 0.0
    rows_scale, modules_scale = noise_scales(settings, update)
    change = clip_rows(update.entity - received.entity, settings)
    entity = received.entity + _noised(change, multiplier * rows_scale, generator)
    # In the order of names, which a checkpoint does not change: so every part gets its own noise.
    changes = clip_together(
        {name: update.modules[name] - received.modules[name] for name in sorted(update.modules)},
        settings.module_clip_norm,
    )
    modules = {
        name: received.modules[name] + _noised(value, multiplier * modules_scale, generator)
        for name, value in changes.items()
    }
    tokens = _private_tokens(update, settings, multiplier, generator)
    soft_queries = _private_queries(update, settings, multiplier, generator)
    return replace(update, num_triples=1, entity=entity, modules=modules, tokens=tokens, soft_queries=soft_queries)


def noise_scales(settings: DifferentialPrivacyConfig, update: ClientUpdate | GlobalModel) -> tuple[float, float]:
    """Return sigma / z of rows and of modules; which parts there are can be read off a message or a model."""
    num_parts = 1 + bool(update.modules)
    if isinstance(update, ClientUpdate):
        num_parts += (update.tokens is not None) + 2 * (update.soft_queries is not None)
    if settings.unit == "client":
        return math.sqrt(num_parts) * settings.clip_norm, math.sqrt(num_parts) * settings.module_clip_norm
    has_tokens = isinstance(update, ClientUpdate) and update.tokens is not None
    return math.sqrt(1 + has_tokens) * settings.clip_norm, settings.module_clip_norm


def clip_rows(change: Tensor, settings: DifferentialPrivacyConfig) -> Tensor:
    """Scale the change of rows [num_rows, dim] down to the bound: as a whole, or each row."""
    if settings.unit == "client":
        return clip_together({"rows": change}, settings.clip_norm)["rows"]
    return clip_each(change, settings.clip_norm)


def clip_together(values: Mapping[str, Tensor], bound: float) -> Params:
    """Scale tensors down by one factor, so that their norm together is at most the bound."""
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
    factor = min(1.0, _WITHIN * bound / norm) if norm > 0 else 1.0
    return {name: value * factor for name, value in values.items()}


def clip_each(values: Tensor, bound: float) -> Tensor:
    """Scale each row of [num_rows, dim] down to a norm of at most the bound."""
    norm = values.double().square().sum(-1, keepdim=True).sqrt()
    return values * (_WITHIN * bound / norm.clamp(min=1e-30)).clamp(max=1).to(values.dtype)


def noised_model(
    config: Config,
    rows: RowMean,
    modules: ModuleMean,
    old: GlobalModel,
    ownership: Mapping[int, Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Params]:
    """Turn the sums of clipped updates into the next rows and modules, with the server's noise.

    The noise is on every row in every round, and divisors are the numbers of clients to be expected, so that nothing
    but the noised sum tells who took part.

    Args:
        config: the experiment.
        rows: sums of the round.
        modules: sums of the round, in which all clients weigh alike.
        old: the model that the round began with.
        ownership: client -> global ids of its rows, int64 [num_rows].
        generator: of the noise.

    Returns:
        Rows [num_entities, dim] and modules; a row that nobody owns stays as it is.
    """
    settings, rate = config.privacy, config.federation.cohort_fraction
    row_noise, module_noise = (settings.noise_multiplier * scale for scale in noise_scales(settings, old))
    owners = torch.zeros(len(old.entity), dtype=torch.float64)
    for ids in ownership.values():
        owners[ids] += 1
    change = (rows.total - rows.counts.unsqueeze(1) * encode(old.entity)).double() / SCALE
    step = _noised(change, row_noise, generator) / (rate * owners.clamp(min=1)).unsqueeze(1)
    entity = torch.where((owners > 0).unsqueeze(1), old.entity + step.float(), old.entity)
    weight = modules.weight.double() / SCALE  # a client's is 1 / num_clients
    noised = {}
    for name, value in sorted(old.modules.items()):
        total = modules.totals.get(name, torch.zeros(value.shape, dtype=torch.int64))
        mean_change = total.double() / SCALE - weight * value.double()
        noise = _noised(torch.zeros_like(mean_change), module_noise / len(ownership), generator)
        noised[name] = (value.double() + (mean_change + noise) / rate).float()
    return entity, noised


def _private_tokens(
    update: ClientUpdate, settings: DifferentialPrivacyConfig, multiplier: float, generator: torch.Generator
) -> Tensor | None:
    tokens, present = update.tokens, update.token_present
    if tokens is None or present is None or not len(tokens):
        return tokens
    width = tokens.shape[1]
    clipped = clip_each(tokens, math.sqrt(width))
    if settings.unit == "client":
        num_parts = 2 + bool(update.modules) + 2 * (update.soft_queries is not None)
        bound = torch.full((len(tokens), 1), math.sqrt(width * len(tokens)))
    else:
        num_parts = 2
        column = present.nonzero()[:, 1]
        bound = (width * present.sum(0)[column]).double().sqrt().unsqueeze(1)
    noise = torch.randn(tokens.shape, generator=generator) * bound * (multiplier * math.sqrt(num_parts))
    return functional.layer_norm(clipped + noise.to(clipped.dtype), (width,))


def _private_queries(
    update: ClientUpdate, settings: DifferentialPrivacyConfig, multiplier: float, generator: torch.Generator
) -> SoftQueries | None:
    soft = update.soft_queries
    if soft is None:
        return None
    num_tables, num_queries, width = soft.queries.shape
    num_parts, num_together = 2, 1
    if settings.unit == "client":
        num_parts = 3 + bool(update.modules) + (update.tokens is not None)
        num_together = num_queries
    scale = multiplier * math.sqrt(num_parts * num_together)
    flat = soft.queries.transpose(0, 1).reshape(num_queries, num_tables * width)
    flat = _noised(clip_each(flat, settings.query_clip_norm), scale * settings.query_clip_norm, generator)
    queries = flat.view(num_queries, num_tables, width).transpose(0, 1).contiguous()
    labels = _noised(soft.log_labels.exp(), scale, generator).clamp(min=_LEAST_LABEL)
    return SoftQueries(queries, soft.candidates, (labels / labels.sum(1, keepdim=True)).log())


def _noised(values: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    if deviation == 0:
        return values
    return values + deviation * torch.randn(values.shape, generator=generator, dtype=values.dtype)
