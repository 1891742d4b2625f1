"""Every rule that spans rooms, checked before anything is built: all that is wrong is reported at once.

A rule that one room can check alone belongs to that room. Each problem names the key, what it got and what would be
legal, the nearest legal value where there is one. Imports without torch.
"""

import math
import re
from collections.abc import Iterator

from data_pipeline.config import training_problems
from data_pipeline.examples.kinds import Facts, Kind
from data_pipeline.store import Store
from launcher.anomaly.config import Policy
from launcher.config import RunConfig, flatten, missing, to_dict
from launcher.layout_rules import divisors, layout_problems, multiples, nearest
from launcher.length_rules import length_problems
from launcher.optimizer_rules import optimizer_problems
from launcher.watching_rules import watching_problems
from model import families, projections
from model.config import Classified, ModelConfig, ObjectiveName, Position, RopeScaling
from model.size import FP8_TILE, head_size
from parallel.checkpoint.mirror import place
from parallel.common.errors import ConfigError, Problem
from parallel.config import BestMetric, Precision

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_VOCABULARY_MULTIPLE = 128

_POSITIVE = (
    "model.layers", "model.hidden_size", "model.heads", "model.kv_heads", "model.head_size", "model.ffn_hidden_size",
    "model.norm_eps", "model.rope_base", "model.initial_std", "model.vocabulary_size", "model.positions",
    "model.sliding_window", "model.full_attention_every", "model.query_pre_attention_scalar",
    "model.attention_softcap", "model.logit_softcap", "model.rope_share", "model.rope_local_base",
    "model.rope_scaling.original_positions", "model.mup.base_hidden_size", "model.mup.base_head_size",
    "model.latent.kv_rank", "model.latent.q_rank", "model.lora.rank", "model.lora.alpha",
    "model.latent.rope_head_size", "model.latent.value_head_size", "model.moe.scale", "model.moe.groups",
    "model.moe.top_groups", "model.moe.group_experts", "model.moe.top_k", "model.moe.ffn_hidden_size",
    "model.moe.shared_ffn_hidden_size",
    "train.steps", "train.global_batch_size", "train.micro_batch_size", "train.sequence_length",
    "train.log_every_steps", "train.profile_start_step", "train.profile_stop_step", "evaluate.sample_tokens",
    "evaluate.tasks.every_steps", "evaluate.tasks.limit",
    "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.context", "parallel.expert",
    "parallel.recompute.blocks", "optimizer.learning_rate", "optimizer.eps",
    "optimizer.schedule.decay_steps", "optimizer.muon.iterations", "optimizer.adafactor.min_scale",
    "optimizer.adafactor.clip", "checkpoint.every_steps", "checkpoint.every_seconds", "checkpoint.keep",
    "checkpoint.keep_every_steps", "evaluate.every_steps", "evaluate.batches",
    "watchdog.limit_seconds", "watchdog.long_limit_seconds", "watchdog.straggler_steps", "watchdog.straggler_share",
    "watchdog.straggler_looks", "watchdog.straggler_seconds", "watchdog.straggler_quiet_seconds",
    "anomaly.window_steps", "anomaly.deviations", "anomaly.replicas_every_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "run.seed", "train.z_loss", "model.moe.experts", "model.moe.first_layer", "model.moe.load_balance_loss",
    "model.moe.z_loss", "model.moe.bias_loss", "model.classes.number", "model.lora.initial_std",
    "optimizer.weight_decay", "optimizer.clip_norm", "optimizer.schedule.warmup_steps",
    "optimizer.schedule.min_learning_rate", "checkpoint.keep_best", "checkpoint.failures",
    "anomaly.tries",
)  # fmt: skip


def check_training(config: RunConfig, *, ranks: int, store: Store | None = None) -> None:
    """Refuses a configuration that `bloomery train` could not run on this many ranks.

    Where a store is handed over, the configuration is held against it too.

    Raises:
        ConfigError: with every problem that was found.
    """
    problems = missing(config, "run", "model", "train", "data")
    if not problems:
        problems = list(_numbers(config))
    if not problems:
        rules = (
            _run(config),
            length_problems(config),
            _objective(config),
            _model(config),
            _mup(config),
            projections.problems(config.model),
            _eight_bits(config),
            layout_problems(config, ranks),
            watching_problems(config, ranks),
        )
        problems = [problem for rule in rules for problem in rule]
        if store is not None:
            problems.extend(_against_store(config, store))
    if problems:
        raise ConfigError(problems)


def _numbers(config: RunConfig) -> Iterator[Problem]:
    """Numbers that make no sense whatever the others are; rules that divide come only after these."""
    values = flatten(to_dict(config))
    for key in _POSITIVE:
        if values[key] is not None and not values[key] > 0:
            yield Problem(key=key, got=values[key], legal="a number above 0")
    for key in _NOT_NEGATIVE:
        if not values[key] >= 0:
            yield Problem(key=key, got=values[key], legal="0 or more")
    yield from families.unknown(config.model)
    yield from optimizer_problems(config)
    if config.parallel.zero_stage not in range(4):
        yield Problem(key="parallel.zero_stage", got=config.parallel.zero_stage, legal="0, 1, 2 or 3")
    for name, weight in config.data.mixture.items():
        if not (weight >= 0 and math.isfinite(weight)):
            yield Problem(key=f"data.mixture.{name}", got=weight, legal="a share of 0 or more")
    yield from training_problems(config.data, config.train.sequence_length)


def _eight_bits(config: RunConfig) -> Iterator[Problem]:
    """Kernels for products in eight bits have tiles, and those of tensor parallelism are not built."""
    if config.precision is not Precision.fp8:
        return
    if config.parallel.tensor > 1:
        yield Problem(key="precision", got="fp8", legal="bf16 where parallel.tensor is above 1")
    model, train = config.model, config.train
    tokens = train.micro_batch_size * train.sequence_length // config.parallel.context
    lengths = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.head_size": head_size(model) * math.gcd(model.heads, model.kv_heads or model.heads),
        "model.latent.kv_rank": model.latent.kv_rank or FP8_TILE,
        "model.latent.q_rank": model.latent.q_rank or FP8_TILE,
        "train.sequence_length": tokens,
    }
    for key, length in lengths.items():
        if length % FP8_TILE:
            yield Problem(key=key, got=length, legal=f"a multiple of {FP8_TILE} with precision=fp8")


def _run(config: RunConfig) -> Iterator[Problem]:
    if not _NAME.fullmatch(config.run.name):
        legal = "letters, digits, `.`, `_` and `-`, not beginning with a dot"
        raw = re.sub(r"[^A-Za-z0-9._-]+", "-", config.run.name).strip(".-")
        yield Problem(key="run.name", got=config.run.name, legal=f"{legal}, such as {raw or 'first'}")
    best = config.checkpoint
    if best.keep_best and best.best_by is BestMetric.validation_loss and config.evaluate.every_steps is None:
        legal = "0 without evaluate.every_steps, for nothing is measured; or checkpoint.best_by=loss"
        yield Problem(key="checkpoint.keep_best", got=best.keep_best, legal=legal)
    if config.anomaly.not_finite is Policy.tell:
        yield Problem(key="anomaly.not_finite", got="tell", legal="skip, rollback or stop: NaN would stay for ever")
    if config.checkpoint.mirror is not None:
        try:
            place(config.checkpoint.mirror)
        except (ValueError, ImportError) as error:
            legal = f"a path or a URL that can be reached: {error}"
            yield Problem(key="checkpoint.mirror", got=config.checkpoint.mirror, legal=legal)


def _objective(config: RunConfig) -> Iterator[Problem]:
    family = families.family(config.model)
    yield from family.problems(config.model)
    wanted, legal = config.train.objective, families.objectives(config.model)
    if wanted is not None and wanted not in legal:
        named = " or ".join(legal)
        said = f"{named}, by which this {config.model.family} is trained"
        yield Problem(key="train.objective", got=wanted, legal=said)
    if config.data.fill_in_the_middle.rate and families.objective(config.model, wanted) != ObjectiveName.causal_lm:
        legal_rate = "0 without train.objective=causal_lm, which alone predicts what follows"
        got = config.data.fill_in_the_middle.rate
        yield Problem(key="data.fill_in_the_middle.rate", got=got, legal=legal_rate)


def _model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    kv_heads = model.kv_heads or model.heads
    if model.head_size is None and model.hidden_size % model.heads:
        whole = nearest(model.hidden_size, multiples(model.heads, model.hidden_size))
        legal = f"a multiple of model.heads = {model.heads}, such as {whole}, or model.head_size given"
        yield Problem(key="model.hidden_size", got=model.hidden_size, legal=legal)
    elif model.position is Position.rope:
        yield from _rotary(model)
    yield from _latent(model)
    if model.heads % kv_heads:
        legal = f"a divisor of model.heads = {model.heads}, such as {nearest(kv_heads, divisors(model.heads))}"
        yield Problem(key="model.kv_heads", got=kv_heads, legal=legal)
    if model.vocabulary_size is not None and model.vocabulary_size % _VOCABULARY_MULTIPLE:
        padded = math.ceil(model.vocabulary_size / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        legal = f"a multiple of {_VOCABULARY_MULTIPLE}, such as {padded}"
        yield Problem(key="model.vocabulary_size", got=model.vocabulary_size, legal=legal)
    if not 0 <= model.dropout < 1:
        yield Problem(key="model.dropout", got=model.dropout, legal="a share from 0 to below 1")
    if model.position is Position.learned and config.train.sequence_length > (model.positions or math.inf):
        legal = f"at most model.positions = {model.positions}, the rows of the table of learned positions"
        yield Problem(key="train.sequence_length", got=config.train.sequence_length, legal=legal)
    yield from _pattern(model)
    if model.full_attention_every is not None and model.sliding_window is None:
        legal = "null without model.sliding_window: then every layer attends to the whole document"
        yield Problem(key="model.full_attention_every", got=model.full_attention_every, legal=legal)


_OTHER_LAYERS = {"M": "Mamba", "*": "Mamba's hybrids", "G": "gated delta rule (GDN)", "D": "gated delta rule (GDN)"}
"""Letters that patterns of hybrids have elsewhere."""


def _pattern(model: ModelConfig) -> Iterator[Problem]:
    """Kinds of layers that are here."""
    if model.pattern is None:
        return
    for letter, kind in _OTHER_LAYERS.items():
        if letter in model.pattern:
            legal = (
                f"letters W and F: layers of {kind} need Transformer Engine and CUDA kernels, which are not used here"
            )
            yield Problem(key="model.pattern", got=model.pattern, legal=legal)
            return
    if not model.pattern or set(model.pattern) - {"W", "F"}:
        legal = "letters W (within model.sliding_window) and F (to the document's start), such as WWWF"
        yield Problem(key="model.pattern", got=model.pattern, legal=legal)
    elif model.sliding_window is None:
        legal = "null without model.sliding_window: every layer attends to the whole document"
        yield Problem(key="model.pattern", got=model.pattern, legal=legal)
    elif model.full_attention_every is not None:
        legal = "null with model.full_attention_every, which says the same"
        yield Problem(key="model.pattern", got=model.pattern, legal=legal)


def _mup(config: RunConfig) -> Iterator[Problem]:
    """Where the rules of widths are known to hold."""
    model, mup = config.model, config.model.mup
    if mup.base_hidden_size is None:
        if mup.base_head_size is not None:
            legal = "null without model.mup.base_hidden_size"
            yield Problem(key="model.mup.base_head_size", got=mup.base_head_size, legal=legal)
        return
    beside = {"model.scale_embeddings": model.scale_embeddings, "model.latent.kv_rank": model.latent.kv_rank}
    beside |= {"model.query_pre_attention_scalar": model.query_pre_attention_scalar}
    beside |= {"model.decoder_layers": model.decoder_layers}
    for key, got in beside.items():
        if got:
            plain = "false" if got is True else "null"
            legal = f"{plain} with model.mup, whose rules are for sizes that it sets itself"
            yield Problem(key=key, got=got, legal=legal)
    if config.optimizer.name in ("muon", "adafactor"):
        legal = "adamw with model.mup, whose learning rates are Adam's"
        yield Problem(key="optimizer.name", got=config.optimizer.name, legal=legal)


def _latent(model: ModelConfig) -> Iterator[Problem]:
    """What goes with keys and values that are made of a latent."""
    latent = model.latent
    if latent.kv_rank is None:
        return
    if model.head_size is None or model.head_size <= latent.rope_head_size:
        legal = f"given, and above model.latent.rope_head_size = {latent.rope_head_size}: it holds the others too"
        yield Problem(key="model.head_size", got=model.head_size, legal=legal)
    if model.kv_heads not in (None, model.heads):
        legal = f"null or model.heads = {model.heads} with model.latent: every head has keys and values of its own"
        yield Problem(key="model.kv_heads", got=model.kv_heads, legal=legal)
    if model.position is Position.learned:
        yield Problem(key="model.position", got="learned", legal="rope with model.latent")
    if model.rope_share != 1:
        legal = "1 with model.latent, whose rope_head_size says how many channels turn"
        yield Problem(key="model.rope_share", got=model.rope_share, legal=legal)
    for key in ("qk_norm", "attention_bias", "linear_bias"):
        if getattr(model, key):
            yield Problem(key=f"model.{key}", got=True, legal="false with model.latent")


def _rotary(model: ModelConfig) -> Iterator[Problem]:
    size = model.head_size or model.hidden_size // model.heads
    if model.rope_share > 1:
        yield Problem(key="model.rope_share", got=model.rope_share, legal="a share of a head's channels, at most 1")
    elif size % 2:
        yield Problem(key="model.head_size", got=size, legal="an even number, for rotary positions")
    elif model.rotary_channels % 2 or not model.rotary_channels:
        legal = f"a share that leaves an even number of a head's {size} channels, such as {2 / size:g} or 1"
        yield Problem(key="model.rope_share", got=model.rope_share, legal=legal)
    if model.rope_local_base is not None and model.sliding_window is None:
        legal = "null without model.sliding_window: no layer would use it"
        yield Problem(key="model.rope_local_base", got=model.rope_local_base, legal=legal)
    scaling = model.rope_scaling
    if scaling.factor < 1:
        yield Problem(key="model.rope_scaling.factor", got=scaling.factor, legal="1 or more")
    if scaling.kind is RopeScaling.ntk and model.rotary_channels <= 2:
        legal = "another kind where only 2 channels of a head turn"
        yield Problem(key="model.rope_scaling.kind", got=scaling.kind.value, legal=legal)
    if scaling.kind is RopeScaling.yarn and not scaling.beta_fast > scaling.beta_slow > 0:
        legal = f"more than model.rope_scaling.beta_slow = {scaling.beta_slow}, both above 0"
        yield Problem(key="model.rope_scaling.beta_fast", got=scaling.beta_fast, legal=legal)


_KINDS = {
    "answers": (Kind.answers,),
    "targets": (Kind.answers,),
    "classes": (Kind.text_classes, Kind.token_classes),
    "encoder_classes": (Kind.text_classes, Kind.token_classes),
}
"""The examples that a form of samples is made of; the others are made of plain text."""


def _examples(config: RunConfig, store: Store) -> Iterator[Problem]:
    """What an objective learns from is what the store holds."""
    facts = Facts.read(store.path)
    wanted = families.objective(config.model, config.train.objective)
    kinds = _KINDS.get(families.form(config.model, config.train.objective), ())
    if facts is None and kinds:
        legal = f"a store of {' or '.join(kinds)}, which `bloomery data examples` makes, for train.objective={wanted}"
        yield Problem(key="data.store", got=config.data.store, legal=legal)
    if facts is None:
        return
    if facts.kind not in kinds and wanted not in families.OWN:
        legal = f"one that learns from examples of {facts.kind.value}, which {config.data.store} holds"
        yield Problem(key="train.objective", got=str(wanted), legal=legal)
    number, of = config.model.classes.number, config.model.classes.of
    if kinds and facts.labels and number != len(facts.labels):
        legal = f"{len(facts.labels)}, the classes of {config.data.store}: {', '.join(facts.labels)}"
        yield Problem(key="model.classes.number", got=number, legal=legal)
    if kinds and facts.labels and (of is Classified.tokens) != (facts.kind is Kind.token_classes):
        legal = (
            f"{'tokens' if facts.kind is Kind.token_classes else 'texts'}, of which {config.data.store} tells classes"
        )
        yield Problem(key="model.classes.of", got=of.value, legal=legal)


def _against_store(config: RunConfig, store: Store) -> Iterator[Problem]:
    wanted = config.model.vocabulary_size
    if wanted is not None and wanted != store.vocabulary_size:
        legal = f"the store's {store.vocabulary_size} ({config.data.store}), which is also the default"
        yield Problem(key="model.vocabulary_size", got=wanted, legal=legal)
    vocabulary = wanted or store.vocabulary_size
    if vocabulary % config.parallel.tensor:
        legal = f"a divisor of the vocabulary of {vocabulary}"
        yield Problem(key="parallel.tensor", got=config.parallel.tensor, legal=legal)
    yield from _examples(config, store)
    known = sorted(store.sources)
    for name in config.data.mixture:
        if name not in known and store.ended:
            yield Problem(key=f"data.mixture.{name}", got=name, legal=f"a source of the store: {', '.join(known)}")
    if config.data.mixture and not sum(config.data.mixture.values()):
        yield Problem(key="data.mixture", got=dict(config.data.mixture), legal="at least one share above 0")
    if config.evaluate.every_steps is not None and not list(store.shards(split="validation")):
        legal = "empty: the store has no validation documents (data.validation.share when it was built)"
        yield Problem(key="evaluate.every_steps", got=config.evaluate.every_steps, legal=legal)
