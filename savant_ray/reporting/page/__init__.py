"""`report.html`: the report of one run or several side by side in one file that needs no network.

history   a run's record as columns, attempts and samples
charts    its curves, reduced to the points that a screen can show
page      the HTML file, with the timeline of attempts
"""

from savant_ray.reporting.page.page import REPORT, write_page

__all__ = ["REPORT", "write_page"]
