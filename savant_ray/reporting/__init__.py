"""What a run says: in the terminal, on paper, in its record, to trackers; later in tables and pages. No torch, no Ray."""

from savant_ray.reporting.run_report import RunReport
from savant_ray.reporting.trackers import open_trackers

__all__ = ["RunReport", "open_trackers"]
