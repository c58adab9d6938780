"""Every error that HMI raises on purpose; all derive from :class:`HmiError`.

A message says what was wrong, where, and what to do. The command line prints it on one line and exits with 2.
"""

__all__ = [
    "BudgetTooSmallError",
    "CheckpointError",
    "ClusterError",
    "CorpusError",
    "DeadlineExceededError",
    "DeviceUnavailableError",
    "DomainCycleError",
    "DomainExistsError",
    "DomainInUseError",
    "EngineClosedError",
    "EngineFaultError",
    "GeneralChangedError",
    "GeneralInUseError",
    "HmiError",
    "InsufficientMemoryError",
    "InvalidAdapterError",
    "InvalidHeadError",
    "InvalidNameError",
    "InvalidRequestError",
    "InvalidSizeError",
    "MissPolicyWarning",
    "MissingDependencyError",
    "OverloadedError",
    "ReadOnlyStoreError",
    "ReadTimeoutError",
    "StoreBusyError",
    "StoreCorruptError",
    "StoreError",
    "StoreExistsError",
    "StoreFullError",
    "StoreNotFoundError",
    "StoreVersionError",
    "TenantExistsError",
    "TextTooLongError",
    "TrainingDataError",
    "TrainingDivergedError",
    "TrainingMemoryError",
    "UnknownDomainError",
    "UnknownTenantError",
    "UnsupportedModelError",
]


class HmiError(Exception):
    """Base class of all errors raised by HMI."""


class InvalidNameError(HmiError, ValueError):
    """A tenant or domain name does not have the allowed form."""


class InvalidSizeError(HmiError, ValueError):
    """A byte size such as ``256MiB`` is not understood."""


class UnknownTenantError(HmiError, LookupError):
    """No tenant of this name is in the store."""


class UnknownDomainError(HmiError, LookupError):
    """No domain of this name is in the store."""


class TenantExistsError(HmiError):
    """A tenant of this name is already in the store."""


class DomainExistsError(HmiError):
    """A domain of this name is already in the store."""


class DomainCycleError(HmiError, ValueError):
    """The domain would become its own ancestor."""


class DomainInUseError(HmiError):
    """The domain still has tenants or child domains."""


class InvalidAdapterError(HmiError, ValueError):
    """An adapter's tensors or settings do not fit the store's base model."""


class InvalidHeadError(HmiError, ValueError):
    """A head's tensors or labels do not fit the store's base model."""


class BudgetTooSmallError(HmiError, ValueError):
    """A table's byte budget is not enough for one row."""


class UnsupportedModelError(HmiError, ValueError):
    """The base model is of an architecture that HMI does not serve."""


class CorpusError(HmiError):
    """A corpus cannot be read, or holds no text."""


class TrainingDataError(HmiError, ValueError):
    """Examples to train on or to judge by are missing, malformed, of another task or too few."""


class TrainingDivergedError(HmiError, ArithmeticError):
    """A training's loss became infinite or NaN; what it had learned before is kept, if anything."""


class InsufficientMemoryError(HmiError, MemoryError):
    """An engine may take more memory than is left of the budget that it shares with others."""


class TrainingMemoryError(HmiError, MemoryError):
    """A training needs more memory than there is."""


class CheckpointError(HmiError):
    """A checkpoint is damaged, or belongs to another training."""


class MissingDependencyError(HmiError, ImportError):
    """An optional package is needed for what was asked."""


class ClusterError(HmiError, ConnectionError):
    """No Ray cluster answers at the address that was given."""


class InvalidRequestError(HmiError, ValueError):
    """A request cannot be served as it stands."""


class TextTooLongError(InvalidRequestError):
    """A request's text has more tokens than the model has positions."""


class OverloadedError(HmiError, RuntimeError):
    """The engine has no room for the request now.

    Attributes:
        retry_after_seconds: when a new attempt is worth while, as far as is known; None if nothing is known.
    """

    def __init__(self, *arguments: object, retry_after_seconds: float | None = None) -> None:
        super().__init__(*arguments)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceededError(HmiError, TimeoutError):
    """The request's deadline passed before it was served."""


class DeviceUnavailableError(HmiError, RuntimeError):
    """An engine was asked to compute on a device that cannot be used here."""


class EngineClosedError(HmiError, RuntimeError):
    """The engine was closed before the call."""


class EngineFaultError(HmiError, RuntimeError):
    """The engine failed where it should not have; the request may be served when it is sent again."""


class StoreError(HmiError):
    """Base class of the errors of a store on disk."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """The folder is no store."""


class StoreExistsError(StoreError, FileExistsError):
    """The folder already holds something."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of HMI."""


class StoreCorruptError(StoreError):
    """A file of the store is damaged or missing."""


class StoreBusyError(StoreError):
    """Another process is writing to the store."""


class GeneralChangedError(StoreError):
    """The base model has been replaced since the store was opened."""


class GeneralInUseError(StoreError):
    """The base model still has tenants that fit no other."""


class StoreFullError(StoreError, OSError):
    """The disk has no room; nothing of the change was kept."""


class ReadTimeoutError(StoreError, TimeoutError):
    """A file is being read, and the read does not end."""


class ReadOnlyStoreError(StoreError):
    """The store was opened with ``read_only=True``."""


class MissPolicyWarning(UserWarning):
    """A tenant is served under another miss policy than the one it was trained under."""
