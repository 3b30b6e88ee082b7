"""Exceptions that chexlib raises.

A message says what is wrong, the value, what is accepted and the next step.
"""


class ChexlibError(Exception):
    """Base of every error that chexlib raises on purpose."""


class DataError(ChexlibError):
    """A data folder, table or image that cannot be used as it is."""


class ConfigError(ChexlibError, ValueError):
    """A setting outside what is accepted."""


class DivergedError(ConfigError):
    """A training whose scores are no longer finite."""


class ClusterError(ChexlibError):
    """MPI engines that could not be started, or that failed while they worked."""


class WeightsError(ChexlibError):
    """Weights that do not fit the model they are meant for."""
