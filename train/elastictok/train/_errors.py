"""What can go wrong in a run, each with a class of its own."""


class RunFolderError(ValueError):
    """A run folder that cannot be started in or resumed from."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or does not fit the run."""


class NonFiniteError(FloatingPointError):
    """A metric or weight became infinite or not a number."""


class RecompilationError(RuntimeError):
    """A step whose inputs differ from those that the step was compiled for."""


class DataError(ValueError):
    """Batches that cannot be trained on: none left, or of the wrong kind."""
