"""Where a search keeps its trials: an Optuna study in a journal, and what its trials are at."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import dump
from ..errors import UserError
from .search_config import Search, encode
from .search_space import Plan, distributions, values_of
from .steps import MadeOf

STATES = ("complete", "pruned", "failed", "interrupted")  # in the order of the table


@contextlib.contextmanager
def sole_owner(journal: Path) -> Iterator[None]:
    """Holds the journal for this process: another one's running trial must not be taken for an interrupted
    one."""
    with journal.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"dir: a search is running in {journal.parent}; wait for it, or give another dir"
            ) from None
        yield


def open_study(journal: Path, search: Search) -> Any:
    """The Optuna study in ``journal``, which has to be ours alone."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = journal.read_bytes()
    if not text.endswith(b"\n"):  # the process died while it wrote the last line
        os.truncate(journal, text.rfind(b"\n") + 1)
    Path(f"{journal}.lock").unlink(missing_ok=True)  # Optuna's, of a process that died
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    pruner = optuna.pruners.NopPruner()
    if search.prune:
        pruner = optuna.pruners.MedianPruner(search.prune.warmup_trials, search.prune.warmup_steps)
    return optuna.create_study(
        study_name="search", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
    )


def remember(study: Any, plan: Plan) -> None:
    """Note what the search is of. Raises UserError where the journal is of something else; `trials` may
    change."""
    search = encode(plan.search.model_dump(mode="json", exclude={"dir", "trials"}))
    now = {"search": MadeOf(search), "config": MadeOf(dump(plan.first_config()), plan.files())}
    before = study.user_attrs.get("given")
    if before is not None:
        for part, file in (("search", plan.origin), ("config", plan.config)):
            if change := now[part].change_since(MadeOf(before[part], before.get("files"))):
                raise UserError(
                    f"dir: {plan.search.dir} holds a search of something else: in {file}, {change}; "
                    "undo that, give another dir, or delete the folder"
                )
    if before is None or "files" not in before:  # an earlier version did not note them
        given = {part: made_of.settings for part, made_of in now.items()} | {"files": now["config"].files}
        study.set_user_attr("given", given)


def close_left_over(study: Any, search: Search) -> None:
    """Mark as failed what a process that is gone was training."""
    from optuna.trial import TrialState

    while study.get_trials(states=(TrialState.WAITING,)):
        study.ask(distributions(search))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def latest(study: Any) -> dict[int, Any]:
    """By place, the last trial that was there: an interrupted one is tried again in its place."""
    return {trial.user_attrs["place"]: trial for trial in study.trials}


def state_of(trial: Any) -> str:
    """One of ``STATES``; a trial without an error that did not end was interrupted."""
    name = trial.state.name.lower()
    return name if name in STATES else "failed" if "error" in trial.user_attrs else "interrupted"


def settled(study: Any) -> set[int]:
    """The places that are not tried again. Where nothing has succeeded yet, what failed is: its cause may be
    gone."""
    states = {place: state_of(trial) for place, trial in latest(study).items()}
    if not {"complete", "pruned"} & set(states.values()):
        return set()
    return {place for place, state in states.items() if state != "interrupted"}


def row_of(trial: Any, search: Search) -> dict[str, Any]:
    """One trial as plain data; the objective of a pruned one is that of its last evaluation."""
    noted = trial.user_attrs
    return {
        "trial": noted["place"],
        "state": state_of(trial),
        "objective": trial.value,
        "step": trial.last_step,
        "values": values_of(search, trial.params),
        "metrics": noted.get("metrics", {}),
        "seconds": noted.get("seconds"),
        "error": noted.get("error"),
    }
