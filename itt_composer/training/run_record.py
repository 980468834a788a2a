"""Write the manifest when training starts, and see that the optimizer is that of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.core import Callback, State, Timestamp
from composer.loggers import Logger
from composer.utils import dist
from omegaconf import DictConfig, OmegaConf

from itt_composer.training.manifest import write_manifest
from itt_composer.training.resume import data_sha256
from itt_composer.training.run_error import RunError


class RunRecord(Callback):
    """Writes the manifest of a run when it trains, so that a start that fails leaves the one before.

    A checkpoint restores the hyperparameters that its optimizer had, and the learning rates that its schedule starts
    from, whatever the config says. Here they are set to the config's again.

    Args:
        config: resolved, as the manifest is to say it.
        path: of the manifest; None for no manifest.
        batch: that of the checkpoint from which the run is to continue; None: not known, or from the start.
    """

    def __init__(self, config: DictConfig, path: Path | None, batch: int | None = None):
        # Foundry takes entries out of the config that it is given.
        self.config, self.path, self.batch = config.copy(), path, batch
        self._configured: list[list[dict[str, Any]]] = []

    def before_load(self, state: State, logger: Logger) -> None:
        """Remember the optimizer as it is configured."""
        self._configured = [
            [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
            for optimizer in state.optimizers
        ]

    def after_load(self, state: State, logger: Logger) -> None:
        """Set it again, and the rates to where their schedule is.

        Raises:
            RunError: Composer has loaded another checkpoint than the run was to continue from, or none.
        """
        if self.batch is not None and state.timestamp.batch != self.batch:
            raise RunError(
                f'{self.config.run_name}: to continue from batch {self.batch}, and Composer has loaded batch '
                f'{state.timestamp.batch.value}; fsdp_config.state_dict_type, save_weights_only and save_filename must '
                'be those of the checkpoint, or set run_name='
            )
        if state.timestamp.batch == 0:
            return
        now = state.timestamp
        for optimizer, configured in zip(state.optimizers, self._configured, strict=True):
            for group, values in zip(optimizer.param_groups, configured, strict=True):
                group.update({key: value for key, value in values.items() if key != 'lr'})
        # The schedule of a batch is that of the timestamp before the one that it starts at, as Composer steps it.
        state.timestamp = _one_batch_before(now)
        for schedule in state.schedulers:
            groups = schedule.optimizer.param_groups
            schedule.base_lrs = [group['initial_lr'] for group in groups]
            for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group['lr'] = base * factor(schedule.last_epoch)
        state.timestamp = now

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log the config, which foundry's ``log_config`` would print as well."""
        logger.log_hyperparameters(OmegaConf.to_container(self.config))  # type: ignore[arg-type]

    def batch_start(self, state: State, logger: Logger) -> None:
        """Write the manifest before the first batch; by then everything that can fail at a start has passed."""
        if self.path is not None and dist.get_global_rank() == 0:
            write_manifest(self.config, self.path, state.timestamp.batch.value, data_sha256(self.config))
        self.path = None


def _one_batch_before(now: Timestamp) -> Timestamp:
    batch = now.batch.value
    return now.copy(
        epoch=now.epoch.value - (now.batch_in_epoch.value == 0),
        batch=batch - 1,
        sample=now.sample.value * (batch - 1) // batch,
        token=now.token.value * (batch - 1) // batch,
    )
