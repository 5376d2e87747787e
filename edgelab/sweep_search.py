"""Search instead of a grid: Optuna proposes configurations of the sweep's space, three goals at once, and no run is done twice.

    least size_bytes        counted by the audit
    least divergence        KL divergence in nats per token, or 1 - exact match (mean of both tasks)
    least latency           modelled milliseconds per decoded token on a device (`device.predict`)

A trial's figures come from the sweep's own store: what the grid, an earlier search or an earlier trial measured is looked up, and what is
measured goes in. So a search may follow a sweep, and a sweep a search. The trials themselves lie in Optuna's own SQLite file beside the
store, one study per goals, device, protocol and seed; a killed search goes on where it was, and `search(n)` means n trials in all.

The sampler is NSGA-II (Deb et al., IEEE TEC 6(2), 2002): generations of a population, ranked by who dominates whom; it takes choices that
depend on other choices as they come. Its random numbers restart with each call, from the seed and the number of trials that are there, so
a search in one go gives the same trials every time, one that was interrupted others of the same kind.

The space here is larger than the grid: any structure with any scheme that fits it.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from edgelab.device import predict
from edgelab.shape import ModelShape, tiny
from edgelab.sweep import Store, Work, _attempt
from edgelab.sweep_space import ENDS, MODELS, Configuration, Protocol

FILE = "search.sqlite"
QUALITIES = ("kld", "exact")
DEVICE, CONTEXT = "galaxy-s22", 512
_POPULATION = 24
_METHODS = ("rtn", "mse", "gptq", "hqq")  # the last fits offsets, which a pruned model can't have
_GRAINS = ("g32", "g64", "row")


def propose(trial) -> Configuration:
    """The configuration that an Optuna `trial` chooses, axis by axis; which axes there are depends on the choices before."""
    model = trial.suggest_categorical("model", list(MODELS))
    has, fields = MODELS[model], {}
    if has.experts:
        experts = trial.suggest_categorical(f"experts of {has.experts}", [has.experts, 3 * has.experts // 4, has.experts // 2])
        fields |= {"experts": experts, "top_k": trial.suggest_int("top_k", 1, has.top_k)}
        if experts < has.experts:
            fields["kept_by"] = trial.suggest_categorical("kept_by", ["reap", "frequency"])
    else:
        fields["channels"] = trial.suggest_categorical("channels", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    zeros = trial.suggest_categorical("zeros", ["none", "0.25", "0.5", "2:4"])
    if zeros != "none":
        fields |= {"sparsity": 0.5 if zeros == "2:4" else float(zeros), "pattern": zeros if zeros == "2:4" else "unstructured"}
    pruned = has.zeros or zeros != "none"
    method = (
        trial.suggest_categorical("method of a pruned model", _METHODS[:-1]) if pruned else trial.suggest_categorical("method", _METHODS)
    )
    if method == "hqq":
        codes = trial.suggest_categorical("offset codes", ["uint2", "uint3", "uint4"])
    else:
        codes = trial.suggest_categorical("codes", ["int2", "int3", "int4", "int8", "nf4", "fp4", "mxfp4"])
    scheme = f"{codes}-{'g32' if codes == 'mxfp4' else trial.suggest_categorical('grain', list(_GRAINS))}"
    if method != "hqq" and codes in ("int2", "int3"):
        fields["ends"] = trial.suggest_categorical("ends", ["", ENDS])
    return Configuration(model, method, scheme, **fields)


def goals(row: dict, quality: str = "kld", device: str = DEVICE, context: int = CONTEXT) -> tuple[float, float, float]:
    """(bytes, divergence, modelled ms per token) of a row: all three the less the better.

    Raises ValueError for a quality that is not known, and where the device's profile lacks a number that decoding needs.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality={quality!r} is not one of {', '.join(QUALITIES)}")
    found = predict(device, ModelShape(**json.loads(row["shape"])), context=context)
    if found.decode is None:
        raise ValueError(f"nothing can be said of decoding on {device}: {found.missing.get('decode', 'the model does not fit')}")
    lost = row["kld"] if quality == "kld" else 1.0 - (row["em_assistant"] + row["em_arithmetic"]) / 2
    return float(row["size_bytes"]), float(lost), 1000.0 / found.decode.value


def check_goals(quality: str = "kld", device: str = DEVICE, context: int = CONTEXT) -> None:
    """Raises ValueError for goals that no row can have, so that nothing is measured for them: see `goals`."""
    # the smallest of models fits each device: what is missing then is missing for all
    row = {"shape": json.dumps(asdict(tiny())), "size_bytes": 1, "kld": 0.0, "em_assistant": 1.0, "em_arithmetic": 1.0}
    goals(row, quality, device, context)


def search(
    store: Store,
    identify: Callable[[Configuration], str],
    work: Work,
    trials: int,
    *,
    quality: str = "kld",
    device: str = DEVICE,
    context: int = CONTEXT,
    protocol: Protocol | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[tuple[Configuration, tuple[float, float, float]]]:
    """The configurations that no other trial dominates in size, divergence and latency, with these three, after `trials` trials in all.

    `identify` and `work` as for `sweep`: id and row of a configuration. A configuration that raises is a trial without figures, and its
    message is kept in `store`. Raises ImportError where Optuna is missing, ValueError for fewer than one trial or as `goals` does.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("a search needs optuna: pip install 'edgelab[sweep]'") from error
    if trials < 1:
        raise ValueError(f"trials={trials} must be at least 1")
    check_goals(quality, device, context)
    about = {"quality": quality, "device": device, "context": context, "seed": seed, "protocol": asdict(protocol or Protocol())}
    name = f"{quality} on {device}, {hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name=name,
                storage=f"sqlite:///{Path(store.folder).resolve() / FILE}",
                load_if_exists=True,
                directions=["minimize"] * 3,
            )
        # a killed run leaves its trial "running": it is none, and the next one takes its place
        for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(t.number, state=optuna.trial.TrialState.FAIL)
        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        over = len(study.get_trials(deepcopy=False, states=ended))
        study.sampler = optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed + over)

        def objective(trial) -> tuple[float, float, float]:
            c = propose(trial)
            id = identify(c)
            trial.set_user_attr("configuration", c.to_json())
            row = store.row(id)
            if row is None:
                _, row, said = _attempt(work, id, c)
                store.put(id, c, row, said)
                if row is None:
                    raise optuna.TrialPruned(said)
            return goals(row, quality, device, context)

        with tqdm(total=trials, initial=min(over, trials), desc="search", unit="trial", disable=not progress) as bar:
            for _ in range(over, trials):
                study.optimize(objective, n_trials=1)
                bar.update()
        # each configuration once: a trial may come again
        best = {t.user_attrs["configuration"]: tuple(t.values) for t in study.best_trials}
    finally:
        optuna.logging.set_verbosity(before)
    return sorted(((Configuration.from_json(c), v) for c, v in best.items()), key=lambda x: (x[1], x[0].label))
