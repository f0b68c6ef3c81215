"""ecdit_ds: training very large sparse diffusion transformers with expert-choice routing."""

__version__ = "0.1.0"
