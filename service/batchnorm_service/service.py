"""What the endpoints share: one object that a process makes at its start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from batchnorm_service.models import Repository
from batchnorm_service.protocol import Rules
from batchnorm_service.settings import Settings
from batchnorm_service.statistics import Statistics


@dataclass(frozen=True)
class Service:
    """A process's settings, its models, and what it counts."""

    settings: Settings
    repository: Repository
    statistics: Statistics

    @cached_property
    def rules(self) -> Rules:
        """What the settings say of messages."""
        return Rules(null=self.settings.nan == "null")
