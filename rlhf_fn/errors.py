"""What can go wrong outside of arithmetic: with files, tokenizers and checkpoints."""


class DataError(ValueError):
    """A record that cannot be used. Its message begins `file:line:column`."""

    def __init__(self, message: str, *, file: str, line: int, column: int = 1):
        super().__init__(f"{file}:{line}:{column}: {message}")
        self.file, self.line, self.column = file, line, column


class TokenizerError(ValueError):
    """A tokenizer without a token that training needs, or one that writes a token twice."""


class StorageError(OSError):
    """The file system refused (full, read-only, not a directory, ...); `errno` says which."""


class CheckpointError(RuntimeError):
    """There are checkpoints, and none can be used. Never a reason to start again from zero."""


class CorruptCheckpoint(CheckpointError):
    """A file is missing, cut short or changed: its bytes are not the ones that were saved."""


class IncompatibleCheckpoint(CheckpointError):
    """A sound checkpoint of something else: other names, shapes, dtypes, settings or version."""


class UnsafeCheckpoint(CheckpointError):
    """A checkpoint that would run code or read outside of its own directory."""


class CheckpointLocked(CheckpointError):
    """Another live process writes to this directory."""


class RewardError(RuntimeError):
    """A reward function raised, or returned something else than a finite number per answer."""
