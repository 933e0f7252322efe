"""mpsrun runs the independent branches of a PyTorch network at the same time on one GPU."""

TYPE_CHECKING = False  # imports nothing: `python -m mpsrun` runs this with the working directory on sys.path
if TYPE_CHECKING:
    from mpsrun.run.branches import Branches as Branches

__version__ = "0.1.0"
__all__ = ["Branches", "__version__"]


def __getattr__(name: str) -> object:
    """Import `Branches` on first use, so that the launcher never imports torch."""
    if name == "Branches":
        from mpsrun.run.branches import Branches

        return Branches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
