"""`report.html`: what a run, or several side by side, did; one file that needs no network.

history   a run's record as columns, launches and samples
curves    thousands of steps as the few points that a screen can show
charts    which curves are drawn together
timeline  launches and what lies between them, as places on a strip
page      all of it in one HTML file
"""

from savant_ray.reporting.page.page import write_page

__all__ = ["write_page"]
