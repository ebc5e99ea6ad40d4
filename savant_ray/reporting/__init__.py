"""Reports of a run: console, log, record, trackers; tables and HTML pages made from the record. No torch, no Ray."""

from savant_ray.reporting.run_report import RunReport
from savant_ray.reporting.trackers import open_trackers

__all__ = ["RunReport", "open_trackers"]
