"""savant_ray trains Savant, a small recurrent-depth language model, as a Ray Train job."""

__version__ = "0.1.0"
