"""Every setting, once: `fields` lists them, `values` checks each value, `sources` merges option, environment and file.

`notices` finds names that have no effect, and signs that a real backend was intended.
"""

from sidecar.settings.fields import FOREIGN_NAMES, NOT_YET, PASSWORD, PREFIX, SECRETS, Settings
from sidecar.settings.notices import missing_folder, notices, open_to_all, refuse_unintended_simulation
from sidecar.settings.sources import SettingsError, load, option_name, with_unusable_ports_removed
from sidecar.settings.values import METAVARS, seconds_of

__all__ = [
    "FOREIGN_NAMES",
    "METAVARS",
    "NOT_YET",
    "PASSWORD",
    "PREFIX",
    "SECRETS",
    "Settings",
    "SettingsError",
    "load",
    "missing_folder",
    "notices",
    "open_to_all",
    "option_name",
    "refuse_unintended_simulation",
    "seconds_of",
    "with_unusable_ports_removed",
]
