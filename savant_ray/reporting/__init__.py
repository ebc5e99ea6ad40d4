"""What a run says: the live terminal line, `training_log.txt`, `metrics.jsonl`, `samples.jsonl`. No torch, no Ray."""

from savant_ray.reporting.run_report import RunReport

__all__ = ["RunReport"]
